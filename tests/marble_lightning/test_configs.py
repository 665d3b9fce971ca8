"""Every file of configs/: the command in its second line parses, and the large runs' settings train a small model."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml

from marble_lightning.cli import main
from marble_lightning.command_line import command_line
from tests.helpers import ROOT

pytestmark = pytest.mark.integration

CONFIGS = ROOT / "configs"
PUBLISHED, OVERNIGHT = ("sd35m", "sd35l", "sd35l_sharded"), ("sd35m_1gpu", "sd35m_8gpu")
LARGE = PUBLISHED + OVERNIGHT


def launched(file: Path) -> list[str]:
    """The `-c` options of the command in a file's second line; a file in a folder is an overlay of `tiny`."""
    if file.parent != CONFIGS:
        method = ["-c", "balancers/pcgrad"] if file.stem == "cadence_marble" else []
        return ["-c", "tiny", *method, "-c", f"{file.parent.name}/{file.stem}"]
    command = shlex.split(file.read_text().splitlines()[1].removeprefix("# "))
    assert command[:2] == ["marble-lightning", "fit"] and command[-1] == file.stem
    return command[2:]


SMALL = sorted(file for file in CONFIGS.rglob("*.yaml") if file.stem not in LARGE)
"""The large ones are parsed by another test."""


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_every_config_parses(file, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", *launched(file), "--print_config"])
    assert end.value.code == 0
    assert "class_path: balancers." in capsys.readouterr().out


def test_stages_differ_from_tiny_in_their_rewards_only():
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())["model"]["rewards"]
    stages = {file.stem: yaml.safe_load(file.read_text()) for file in (CONFIGS / "stages").glob("*.yaml")}
    assert stages.keys() == {"aligned", "published", "conflict"}
    assert stages["published"] == {}
    assert all(stages[name].keys() == {"model"} for name in ("aligned", "conflict"))
    assert all(stages[name]["model"].keys() == {"rewards"} for name in ("aligned", "conflict"))
    assert set(stages["aligned"]["model"]["rewards"].values()) == {None}
    assert stages["aligned"]["model"]["rewards"].keys() < tiny.keys()
    conflict = stages["conflict"]["model"]["rewards"]
    assert {name: conflict[name] for name in tiny} == tiny
    assert conflict.keys() - tiny.keys() == {"ornament"}


@pytest.mark.parametrize("run", [pytest.param("tiny", marks=pytest.mark.slow), "sd35m"])
@pytest.mark.parametrize("name", ["pcgrad", "cagrad", "mgda", "torchjd"])
def test_overlays_of_balancers_are_the_published_methods(name, run, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", f"{CONFIGS}/{run}.yaml", "-c", f"{CONFIGS}/balancers/{name}.yaml", "--print_config"])
    balancer = yaml.safe_load(capsys.readouterr().out)["balancer"]
    assert balancer["class_path"].lower() == f"balancers.{name}"
    cadence = {"refresh_every": 1, "ema_decay": 0.0, "estimate_share": 1.0, "normalize": False}
    assert {option: balancer["init_args"][option] for option in cadence} == cadence


@pytest.mark.parametrize("name", LARGE)
def test_large_runs_keep_the_published_settings(name, capsys):
    """The effective round is the published one: 48 prompts, 24 images of each, 24 of 25 times, one step.

    Overnight runs have other numbers of images, steps and times, and 144 images on each GPU.
    """
    with pytest.raises(SystemExit) as end:
        main(["fit", *launched(CONFIGS / f"{name}.yaml"), "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["balancer"]["class_path"].startswith("balancers.")
    model, data = config["model"], config["data"]
    images = data["prompts_per_round"] * data["images_per_prompt"]
    ranks = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    times = model["sampling"]["steps"], model["sampling"]["times_per_image"]
    if name in PUBLISHED:
        assert (data["prompts_per_round"], data["images_per_prompt"]) == (48, 24) and times == (25, 24)
    else:
        assert images / ranks == 144 and times == (10, 4) and data["held_out_per_source"] == 48
    assert (model["optimizer_steps_per_round"], model["inner_epochs"]) == (1, 1)
    policy = model["policy"]["init_args"]
    assert (policy["rank"], policy["alpha"], policy["dtype"], policy["resolution"]) == (32, 64, "bfloat16", 512)
    assert images // ranks % model["micro_batch_size"] == 0
    assert set(model["rewards"]) == {"pickscore", "hpsv2", "clipscore", "ocr", "geneval"}
    assert model["rewards"]["ocr"]["init_args"]["sources"] == ["ocr"]
    assert set(model["metrics"]) == {"geneval_accuracy", "aesthetic", "imagereward"}


@pytest.mark.slow
def test_the_run_of_z_image_trains_a_small_model(checkpoints, z_image, tmp_path, capsys):
    """Same file and code, with bfloat16 weights and mixed precision; only sizes and paths differ."""
    small = small_settings(checkpoints, tmp_path) | {"model.policy.path": z_image, "model.policy.text_length": 96}
    main(
        [
            "fit",
            *launched(CONFIGS / "z_image.yaml"),
            *(part for pair in small.items() for part in (f"--{pair[0]}", str(pair[1]))),
        ]
    )
    assert "trained" in capsys.readouterr().out


def small_settings(checkpoints: Path, folder: Path) -> dict[str, object]:
    """Settings that make a run of a large configuration small."""
    clip = str(checkpoints / "clip")
    return {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "trainer.strategy": "auto",
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 2,
        "trainer.logger.save_dir": folder,
        "trainer.enable_progress_bar": False,
        "data.folder": ROOT / "marble_lightning/tinyworld/prompts",
        "data.prompts_per_round": 3,
        "data.images_per_prompt": 4,
        "data.held_out_per_source": 1,
        "model.policy.path": checkpoints / "sd3_t5",
        "model.policy.resolution": 16,
        "model.policy.rank": 2,
        "model.policy.text_length": 6,
        "model.policy.prompt_cache": folder / "cache",
        "model.rewards.pickscore.path": clip,
        "model.rewards.pickscore.processor_path": "null",
        "model.rewards.hpsv2.path": clip,
        "model.rewards.hpsv2.file": "null",
        "model.rewards.hpsv2.processor_path": "null",
        "model.rewards.clipscore.path": clip,
        "model.rewards.ocr.workers": 1,  # processes take seconds to start
        "model.rewards.geneval.detector": "marble_lightning.tinyworld.ColourBlobs",
        "model.metrics": "{}",
        "model.sampling.steps": 4,
        "model.sampling.times_per_image": 3,
        "model.evaluation.steps": 2,
        "model.micro_batch_size": 4,
    }


def small_command(name: str, checkpoints: Path, folder: Path) -> list[str]:
    """Options of a large configuration's small run."""
    small = small_settings(checkpoints, folder)
    flags = [part for option, value in small.items() for part in (f"--{option}", str(value))]
    return [*launched(CONFIGS / f"{name}.yaml"), *flags]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_large_runs_can_be_rehearsed(name, checkpoints, tmp_path, capsys):
    main(["fit", *small_command(name, checkpoints, tmp_path), "--trainer.fast_dev_run", "true"])
    shown = capsys.readouterr().out
    assert "Rehearsal, and an estimate of the hours of 2 round(s)" in shown and "the whole run, an estimate" in shown
    assert not list(tmp_path.iterdir())  # neither a run nor the cache of prompts


@pytest.mark.parametrize("name", ["sd35m", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE[1:])])
def test_the_large_runs_train_a_small_model(name, checkpoints, tmp_path, capsys):
    """Same file and code, with T5, bfloat16 weights and mixed precision; only sizes and paths differ."""
    command = small_command(name, checkpoints, tmp_path)
    main(["fit", *command])
    assert "trained" in capsys.readouterr().out
    saved = torch.load(tmp_path / f"{name}/version_0/checkpoints/last.ckpt", weights_only=True)
    adapters = saved["state_dict"]
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    assert max(tensor.abs().max() for key, tensor in adapters.items() if "lora_B.trained" in key) > 0
    assert saved["global_step"] == 2

    policy = command_line(command, run=False).model.policy
    policy.setup(0)
    assert policy.transformer.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.bfloat16
    assert set(policy.text_encoders) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    checkpointed = name in ("sd35l", "sd35l_sharded", "sd35m_1gpu")
    assert policy.transformer.gradient_checkpointing == checkpointed
