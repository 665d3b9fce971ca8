"""fit, validate and predict on the command line; wrong settings fail early with their name."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from marble_lightning.cli import main
from marble_lightning.command_line import command_line
from marble_lightning.evaluation.image_statistics import NAMES
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.nft.loss import Objective
from marble_lightning.policies.averaging import Averaging
from tests.helpers import ROOT
from tests.helpers.command_line import column, small_options

CONFIGS = ROOT / "configs"


def checkpoint(folder: Path, version: int = 0) -> Path:
    return folder / f"tiny/version_{version}/checkpoints/last.ckpt"


def adapters(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def fitted(checkpoints, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run, whose adapter `trained` was evaluated."""
    folder, shown = tmp_path_factory.mktemp("fitted"), io.StringIO()
    changes = ["--model.optimizer.init_args.lr", "0.05", "--model.policy.adapter", "trained"]
    changes += ["--image_drift.patience", "3", "--image_drift.factor", ".inf"]
    with contextlib.redirect_stdout(shown):
        main(["fit", *small_options(checkpoints, folder), *changes])
    return folder, shown.getvalue()


def test_fit_shows_a_table_and_the_printed_command_repeats_it(fitted, capsys):
    folder, shown = fitted
    after = column(shown, "trained")
    assert list(after) == ["pickscore", "hpsv2", "clipscore", "ocr", "geneval", "geneval_accuracy"]
    assert after["pickscore"] != column(shown, "base")["pickscore"]

    saved = adapters(checkpoint(folder))
    assert {name.split(".")[-2] for name in saved} == {"trained", "old", "ema"}
    assert not any("base_layer" in name or "rewards" in name for name in saved)

    (command,) = [line for line in shown.splitlines() if line.startswith("Evaluate again:")]
    main(command.split()[3:])
    again = capsys.readouterr().out
    assert column(again, "trained") == after
    assert "By tag, base -> trained" in again and "mean_of_tags" in again
    assert column(again, "base") == column(shown, "base")
    assert all(f"{source}, 2 prompts" in again for source in ("pickscore", "ocr", "geneval"))


def test_a_checkpoint_of_another_rank_is_refused(small, fitted):
    with pytest.raises(ValueError, match="must hold adapters like this policy's: {'rank': 3"):
        main(["validate", *small, "--model.policy.rank", "3", "--ckpt_path", str(checkpoint(fitted[0]))])


def test_scores_with_other_settings_are_not_compared(small, fitted, capsys):
    main(["validate", *small, "--model.evaluation.steps", "3", "--ckpt_path", str(checkpoint(fitted[0]))])
    shown = capsys.readouterr().out
    assert "change" not in shown
    assert "No scores of the base to compare with: it was not evaluated, or with other settings; evaluate it with" in shown


def test_the_reference_of_image_drift_is_saved(fitted):
    saved = torch.load(checkpoint(fitted[0]), weights_only=True)
    state = saved["callbacks"]["ImageDriftMonitor"]
    assert set(state["reference"]) == set(NAMES)
    assert all(math.isfinite(value) for pair in state["reference"].values() for value in pair)


def test_tensorboard_curves_and_images(fitted):
    events = EventAccumulator(str(fitted[0] / "tiny/version_0")).Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {
        "train/ocr",
        "held_out/geneval",
        "alpha/clipscore",
        "alpha_smoothed/hpsv2",
        "gradient_norms/pickscore",
        "kl",
    }
    expected |= {f"harmony/{kind}/cos_{name}" for kind in ("update", "mean") for name in ("min", "mean", "var")}
    expected |= {
        "time/sampling",
        "time/scoring/ocr",
        "time/waiting_for_scores",
        "time/training",
        "harmony/update/conflict_rate",
    }
    assert expected <= scalars
    assert events.Tags()["images"] == ["held_out", "cosines"]
    assert len(events.Images("held_out")) == 2  # the base and the last round
    assert len(events.Scalars("held_out/pickscore")) == 2


def test_validate_without_a_checkpoint_evaluates_the_base(small, fitted, capsys):
    main(["validate", *small])
    assert column(capsys.readouterr().out, "base") == column(fitted[1], "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.policy.path", "nowhere"], "must be a folder in diffusers format"),
        pytest.param(["--model.rewards", "{}"], "`rewards` must name at least one reward", marks=pytest.mark.slow),
        (["--model.micro_batch_size", "7"], "must be a multiple of `micro_batch_size`"),
        pytest.param(
            ["--data.prompts_per_round", "7"],
            "`prompts_per_round` must be a multiple of the sum of the shares",
            marks=pytest.mark.slow,
        ),
        (["--data.sources", "[pickscore, riddles]"], "Found 'riddles'; known: geneval, ocr, pickscore"),
        (["--model.sampling.times_per_image", "9"], "`sampling.times_per_image` must be 1 to"),
        (
            ["--model.sampling.noisiest_fraction", "0.2"],
            "`sampling.noisiest_fraction` must leave 1 to 4 of the times. Found 0.2",
        ),
        (["--balancer.refresh_every", "0"], "`refresh_every` must be >= 1. Found 0"),
        (["--balancer", "Marbel"], "Marbel"),
        (["--model.sampling.stepz", "3"], "stepz"),
        (["--model.policy.adapter", "old"], "Got value: old"),
        pytest.param(["--model.policy.adapter", "emma"], "emma", marks=pytest.mark.slow),
        (["--model.policy.text_encoder_3", "t5"], "text_encoder_3"),
        (["--model.policy.dtype", "int8"], "Got value: int8"),
        pytest.param(
            ["--model.policy.text_length", "0"], "`policy.text_length` must be >= 1. Found 0", marks=pytest.mark.slow
        ),
        (["--model.policy.init_lora", "nowhere"], "Found no such file nowhere"),
        (["--model.evaluation.resolution", "20"], "`evaluation.resolution` must be a positive multiple of 16"),
        pytest.param(
            ["--checkpoints.keep", "1"], "`checkpoints.keep` must be >= 2, or -1 for all. Found 1", marks=pytest.mark.slow
        ),
        (["--memory.check", "perhaps"], "perhaps"),
        (["--model.inner_epochs", "0"], "`inner_epochs` must be >= 1. Found 0"),
        (["--model.objective.advantage_mode", "best"], "Got value: best"),
        pytest.param(
            ["--model.averaging.old_cap", "1"], "`averaging.old_cap` must be in [0, 1). Found 1", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--model.averaging.old_rate", ".nan"],
            "`averaging.old_rate` must be >= 0 and finite. Found nan",
            marks=pytest.mark.slow,
        ),
        (["--model.averaging.old_start", "-1"], "`averaging.old_start` must be >= 0. Found -1"),
        pytest.param(
            ["--model.objective.kl_weight", ".inf"],
            "`objective.kl_weight` must be >= 0 and finite. Found inf",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.objective.kl_every", "0"], "`objective.kl_every` must be >= 1. Found 0", marks=pytest.mark.slow
        ),
        (
            ["--model.objective.kl_every", "6"],
            "`objective.kl_every` must divide the micro-batches of an optimizer step, 4. Found 6; try 2",
        ),
        (["--model.objective.beta", ".inf"], "`objective.beta` must be > 0 and finite. Found inf"),
        pytest.param(["--model.evaluation.steps", "0"], "`evaluation.steps` must be >= 1. Found 0", marks=pytest.mark.slow),
        (
            ["--model.policy.prompt_cache", __file__],
            f"`policy.prompt_cache` must be a folder. Found a file, or a broken link, {__file__}",
        ),
        (["--trainer.accumulate_grad_batches", "4"], "`accumulate_grad_batches` follows from"),
        (["--trainer.max_epochs", "3"], "`max_epochs` must be a multiple"),
        (["--model.policy.adapter", "none"], "`policy.adapter` must be ema or trained for `fit`"),
        pytest.param(
            ["--model.evaluation.resolution", "40"],
            "`evaluation.resolution` must be a positive multiple of 16",
            marks=pytest.mark.slow,
        ),
        (["--model.evaluation.resolution", "48"], "`model.evaluation.resolution` must be a multiple of 4, at most 32"),
        (["--model.policy.resolution", "64"], "`model.policy.resolution` must be a multiple of 4, at most 32"),
        pytest.param(
            ["--model.evaluation.seed", "-1"], "`evaluation.seed` must be >= 0, or null. Found -1", marks=pytest.mark.slow
        ),
        pytest.param(["--model.evaluation.guidance", "0.5"], "`evaluation.guidance` must be >= 1", marks=pytest.mark.slow),
        (["--data.predict_images", "0"], "`predict_images` must be >= 1. Found 0"),
        (["--results.compare_with", "[nowhere]"], "must be a results.json or a run's folder with one. Found no file"),
        (["--results.columns", "[beauty]"], "`results.columns` must name rewards or metrics: pickscore"),
        pytest.param(
            ["--trainer.limit_train_batches", "2"], "`limit_train_batches` must keep its default", marks=pytest.mark.slow
        ),
        (["--trainer.limit_train_batches", "1"], "`limit_train_batches` must keep its default, 1.0, "),
        (["--trainer.fast_dev_run", "3"], "`trainer.fast_dev_run` must be true or false: a rehearsal has 2 rounds. Found 3"),
        (["--trainer.fast_dev_run", "true", "--ckpt_path", "last"], "`ckpt_path` must be null for a rehearsal"),
        (["--trainer.fast_dev_run", "true", "--model.micro_batch_size", "7"], "must be a multiple of `micro_batch_size`"),
        (["--trainer.overfit_batches", "1.0"], "`overfit_batches` must keep its default, 0.0, "),
        pytest.param(
            ["--trainer.enable_checkpointing", "false"],
            "`trainer.enable_checkpointing` must be true or null",
            marks=pytest.mark.slow,
        ),
        (["--trainer.max_steps", "3"], "`max_steps` must keep its default"),
        (["--trainer.max_time", "00:01:00:00"], "`max_time` must be null"),
        (["--trainer.precision", "bf16-true"], "`precision` must be one of 32-true, bf16-mixed, 16-mixed. Found bf16-true"),
        pytest.param(
            ["--trainer.callbacks", "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}"],
            "`trainer.callbacks` must not add a GradientAccumulationScheduler. Found one: accumulation follows from",
            marks=pytest.mark.slow,
        ),
        (
            ["--trainer.callbacks", "marble_lightning.callbacks.results_writer.Results"],
            "must not add a callback that has a section of settings. Found Results; use `results`",
        ),
        (
            ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: held_out/orc}}"],
            "`monitor` of EarlyStopping must be one of the metrics that the run logs. Found 'held_out/orc'; use e.g. ",
        ),
        (["--ckpt_path", "nowhere.ckpt"], "`ckpt_path` must be a whole checkpoint. Found nowhere.ckpt: no such file from"),
        (["--seed_everything", "true"], "`seed_everything` must be a number >= 0"),
        (["--data.sources", "[pickscore, geneval]"], "`rewards.ocr` must apply to at least one training prompt"),
    ],
)
def test_bad_settings_fail_before_anything_is_loaded_or_written(small, options, message, tmp_path, monkeypatch, capsys):
    def load(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", load)
    with pytest.raises((ValueError, SystemExit)) as error:
        main(["fit", *small, *options])
    assert message in str(error.value) + capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "option", "value", "message"),
    [
        (Averaging, "old_cap", 1.0, r"`averaging\.old_cap` must be in \[0, 1\)\. Found 1"),
        (Averaging, "old_rate", math.nan, r"`averaging\.old_rate` must be >= 0 and finite\. Found nan"),
        (Objective, "kl_weight", math.inf, r"`objective\.kl_weight` must be >= 0 and finite\. Found inf"),
        (Objective, "kl_every", 0, r"`objective\.kl_every` must be >= 1\. Found 0"),
        (Evaluation, "steps", 0, r"`evaluation\.steps` must be >= 1\. Found 0"),
        (Evaluation, "seed", -1, r"`evaluation\.seed` must be >= 0, or null\. Found -1"),
        (Evaluation, "guidance", 0.5, r"`evaluation\.guidance` must be >= 1"),
    ],
)
def test_sections_refuse_bad_settings(settings, option, value, message):
    """The command line makes an object of each section; above are options of the same sections."""
    with pytest.raises(ValueError, match=message):
        settings(**{option: value})


def test_a_run_without_prompts_writes_no_files(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`data\.folder` must be a folder with prompt files\. Found no folder"):
        main(["fit", *small, "--trainer.logger.save_dir", "runs", "--data.folder", "prompts"])
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_in_every_path(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {
        "trainer.default_root_dir": "~/runs",
        "trainer.logger.save_dir": "~/runs",
        "data.folder": "~/prompts",
        "data.predict_file": "~/mine.txt",
        "model.policy.path": "~/sd3",
        "model.policy.prompt_cache": "~/cache",
        "model.policy.init_lora": "~/lora",
        "model.rewards.clipscore.path": "~/clip",
        "predictions.folder": "~/images",
        "results.compare_with": "[~/one, /two, three~/~four]",
    }
    cli = command_line([*small, *(part for name, path in paths.items() for part in (f"--{name}", path))], run=False)
    model_paths = (
        cli.model.rewards["clipscore"].path,
        cli.model.policy.path,
        cli.model.policy.prompt_cache,
        cli.model.policy.init_lora,
    )
    assert model_paths == tuple(str(tmp_path / name) for name in ("clip", "sd3", "cache", "lora"))
    assert (cli.datamodule.folder, cli.datamodule.predict_file) == (tmp_path / "prompts", tmp_path / "mine.txt")
    assert cli.trainer.default_root_dir == cli.trainer.logger.save_dir == str(tmp_path / "runs")
    assert cli.config_init["predictions"].folder == str(tmp_path / "images")
    assert cli.config_init["results"].compare_with == [str(tmp_path / "one"), "/two", "three~/~four"]


def test_another_progress_bar_replaces_the_default(small):
    bar = "lightning.pytorch.callbacks.RichProgressBar"
    cli = command_line([*small, "--trainer.enable_progress_bar", "true", "--trainer.callbacks+", bar], run=False)
    assert type(cli.trainer.progress_bar_callback).__name__ == "RichProgressBar"
