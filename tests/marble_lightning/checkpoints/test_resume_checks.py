"""Errors and warnings of a run that resumes from a checkpoint with other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET, command_line
from marble_lightning.evaluation.results import read
from marble_lightning.hub import export
from marble_lightning.policies.sd3 import TARGETS
from marble_lightning.tinyworld import ColourBlobs
from rewards import GenEval
from tests.helpers.command_line import differences, last, options, state

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]

ONE = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}
TWO = {"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 2}


@pytest.fixture(scope="module")
def one_round(checkpoints, tmp_path_factory) -> Path:
    """The folder of a run of one round."""
    folder = tmp_path_factory.mktemp("one_round")
    main(["fit", *options(checkpoints, folder, **ONE)])
    return folder / "tiny"


@pytest.fixture
def first(one_round, tmp_path) -> Path:
    """The checkpoint of a run of one round, to resume from."""
    shutil.copytree(one_round, tmp_path / "tiny", symlinks=True)
    return last(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(checkpoints, first, tmp_path):
    """With more blocks than the checkpoint, some adapters would silently keep their initial values."""
    shutil.copytree(checkpoints / "sd3", tmp_path / "plain")
    config = SD3Transformer2DModel.load_config(checkpoints / "sd3", subfolder="transformer")
    SD3Transformer2DModel.from_config({**config, "num_layers": 3}).save_pretrained(tmp_path / "plain/transformer")
    other = options(checkpoints, tmp_path, **ONE | {"model.policy.path": tmp_path / "plain"})
    for command in ("validate", "fit"):
        with pytest.raises(ValueError, match=rf"Found another model's, of {checkpoints}/sd3: .*attn.* is missing instead"):
            main([command, *other, "--ckpt_path", str(first)])


def test_targets_are_compared_by_their_layers(checkpoints, first, tmp_path):
    """The order of targets does not matter; `to_q` also matches the second attention of some models, unlike `attn.to_q`."""
    other = options(checkpoints, tmp_path, **ONE)
    main(["validate", *other, "--ckpt_path", str(first), "--model.policy.targets", f"[{', '.join(reversed(TARGETS))}]"])
    wide = ", ".join(target.removeprefix("attn.") for target in TARGETS)
    with pytest.raises(ValueError, match=r"must hold adapters like this policy's: .*'to_q', .*Found .*'attn\.to_q'"):
        main(["validate", *other, "--ckpt_path", str(first), "--model.policy.targets", f"[{wide}]"])


def test_a_checkpoint_of_another_path_with_the_same_architecture_warns(checkpoints, first, tmp_path, caplog):
    """Its base scores are not reused."""
    shutil.copytree(checkpoints / "sd3", tmp_path / "copy")
    other = options(checkpoints, tmp_path, **ONE | {"model.policy.path": tmp_path / "copy"})
    main(["validate", *other, "--ckpt_path", str(first)])
    assert f"The checkpoint was trained on {{'model': '{checkpoints}/sd3', 'revision': None, " in caplog.text
    assert "base" not in read(tmp_path / "tiny/version_1")["prompts"][0]


def test_a_base_scored_by_another_reward_is_not_compared(checkpoints, first, tmp_path):
    other = options(checkpoints, tmp_path, **ONE)
    main(["validate", *other, "--ckpt_path", str(first), "--model.rewards.jpeg.quality", "50"])
    assert "base" not in read(tmp_path / "tiny/version_1")["prompts"][0]


def test_a_detector_is_part_of_the_rewards_identity():
    """Scores depend on the settings of the detector."""
    one, other = (GenEval(ColourBlobs(min_area=area)).identity for area in (14, 300))
    assert {name: one[name] for name in one if one[name] != other[name]} == {"detector min_area": "14"}
    assert one["detector class"].endswith("ColourBlobs")


def test_another_programs_checkpoint(checkpoints, first, tmp_path):
    content = torch.load(first, weights_only=True)
    del content["lora"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"wrote\. Found another program's, .*other\.ckpt"):
        main(["validate", *options(checkpoints, tmp_path, **ONE), "--ckpt_path", str(tmp_path / "other.ckpt")])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_another_balancer_warns(checkpoints, first, tmp_path):
    with pytest.warns(UserWarning, match=rf"{first} was trained with MARBLE; this run resumes with WeightedSum"):
        main(["fit", *options(checkpoints, tmp_path, balancer="WeightedSum", **TWO), "--ckpt_path", "last"])


def test_the_optimizer_keeps_its_options_with_a_warning(checkpoints, first, tmp_path, caplog):
    other = {"model.optimizer.lr": 1e-9, "model.optimizer.weight_decay": 0.5}
    main(["fit", *options(checkpoints, tmp_path, **TWO | other), "--ckpt_path", str(first)])
    warning = f"keeps the options of {first}: lr 0.0015 instead of 1e-09, weight_decay 0.0001 instead of 0.5"
    assert warning in caplog.text
    caplog.clear()  # the options that were kept are those of the new checkpoint, with which nothing is to be warned of
    main(["fit", *options(checkpoints, tmp_path, **TWO), "--ckpt_path", str(last(tmp_path, 1))])
    assert "The optimizer keeps" not in caplog.text


def test_options_changed_by_a_schedule_do_not_warn(checkpoints, tmp_path, caplog):
    cycle = {"model.lr_scheduler": "torch.optim.lr_scheduler.OneCycleLR", "model.lr_scheduler.max_lr": 0.01}
    cycle |= {"model.lr_scheduler.total_steps": 9}
    run = [part for part in options(checkpoints, tmp_path, **TWO | cycle) if part != "--model.lr_scheduler.gamma"]
    run = [part for part in run if part != "0.8"]
    main(["fit", *run, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"])
    main(["fit", *run, "--ckpt_path", str(last(tmp_path))])
    assert "The optimizer keeps" not in caplog.text


def test_checkpoints_hold_no_secrets(checkpoints, tmp_path):
    unified = {"class_path": "rewards.UnifiedReward"}
    unified["init_args"] = {
        "api_key": "sk-secret\n\nover several\nlines",
        "max_tokens": 7,
        "base_url": "http://me:pa-ss@host/v1",
    }
    run = options(checkpoints, tmp_path, **ONE | {"model.metrics": "{}"})
    cli = command_line([*run, "--model.rewards.unified", json.dumps(unified)], run=False)
    assert cli.model.rewards["unified"].api_key == unified["init_args"]["api_key"]
    assert not any(part in cli.model.run_config for part in ("sk-secret", "over several", "lines", "pa-ss"))
    saved = yaml.safe_load(cli.model.run_config)["model"]["rewards"]["unified"]["init_args"]
    assert (saved["api_key"], saved["max_tokens"], saved["base_url"]) == (None, 7, "http://host/v1")


def test_objects_that_torch_does_not_load_are_named(checkpoints, first, tmp_path):
    content = torch.load(first, weights_only=True)
    torch.save(content | {"callbacks": {"mine": Path("here")}}, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"a callback of yours keeps what torch will not load, .*mine\.ckpt: .*[pP]ath"):
        main(["validate", *options(checkpoints, tmp_path, **ONE), "--ckpt_path", str(tmp_path / "mine.ckpt")])


def test_a_resumed_run_from_a_lora_has_no_base(checkpoints, first, tmp_path, caplog):
    """The base is the initial LoRA, which a resumed run no longer has. Scores in the checkpoint are reused if they apply."""
    lora = {"model.policy.init_lora": export(first, tmp_path / "lora").parent}
    main(["fit", *options(checkpoints, tmp_path, **ONE | lora)])
    start = last(tmp_path, 1)
    main(["fit", *options(checkpoints, tmp_path, **TWO | lora), "--ckpt_path", str(start)])
    assert state(last(tmp_path, 2))["base_scores"].equal(state(start)["base_scores"])
    main(["fit", *options(checkpoints, tmp_path, **TWO | lora | {"model.evaluation.steps": 3}), "--ckpt_path", str(start)])
    assert "The base is not evaluated" in caplog.text and state(last(tmp_path, 3))["base_scores"] is None


def test_a_base_evaluated_with_other_settings_is_evaluated_again(checkpoints, first, tmp_path, caplog):
    """The base is sampled, not the policy of the checkpoint. The same options of the optimizer are not warned of."""
    steps = {"model.evaluation.steps": 3}
    main(["fit", *options(checkpoints, tmp_path, **ONE | steps)])
    base = state(last(tmp_path, 1))["base_scores"]
    main(["fit", *options(checkpoints, tmp_path, **TWO | steps), "--ckpt_path", str(first)])
    assert differences(base, state(last(tmp_path, 2))["base_scores"]) == []
    assert "The optimizer keeps" not in caplog.text


def test_results_of_a_run_that_was_killed_after_its_last_round(checkpoints, first, tmp_path, capsys, caplog):
    """The resumed run has nothing left to train, and writes the results of the evaluation before."""
    capsys.readouterr()
    main(["fit", *options(checkpoints, tmp_path, **ONE), "--ckpt_path", "last"])
    shown = capsys.readouterr().out
    assert f"Nothing was left to train: {first} is after 1 rounds" in shown and "Evaluate again" not in shown
    assert "The optimizer keeps" not in caplog.text
    written, resumed = (read(tmp_path / f"tiny/version_{version}") for version in (0, 1))
    assert resumed["evaluated"] == written["evaluated"] | {"checkpoint": str(first.resolve())}
    assert resumed["prompts"] == written["prompts"] and resumed["evaluated"]["optimizer_step"] > 0
    main(["fit", *options(checkpoints, tmp_path, **ONE | {"model.policy.adapter": "trained"}), "--ckpt_path", str(first)])
    assert not (tmp_path / "tiny/version_2/results.json").exists()  # those are the scores of another adapter
