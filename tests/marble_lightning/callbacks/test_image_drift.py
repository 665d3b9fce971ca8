"""Warnings of image drift: they appear exactly if images leave the base's range, also in resumed runs."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, WeightedSum
from marble_lightning.callbacks.image_drift import MIN_STD, ImageDriftMonitor, expected_range, reference_of
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.image_statistics import NAMES
from marble_lightning.module import DiffusionNFT
from marble_lightning.tinyworld import PROMPTS
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Bleached(DiffusionNFT):
    """Its images are white in some rounds, as if the policy had learnt that white has the highest reward."""

    rounds: tuple[int, ...] = ()

    def sample_round(self, seed):
        sampled = super().sample_round(seed)
        white = torch.ones_like(sampled.images)
        return sampled._replace(images=white) if self.current_epoch in self.rounds else sampled


class Recorder(Callback):
    """Keeps the statistics of each round's images, and the metrics logged at its end."""

    def __init__(self) -> None:
        self.statistics: list[torch.Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.statistics.append(pl_module.image_statistics)

    def on_train_epoch_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in metrics if name.startswith("images/")})


def bleach(*rounds: int) -> type[Bleached]:
    return type("Bleached", (Bleached,), {"rounds": rounds})


def warnings_of(caplog) -> list[str]:
    records = [record for record in caplog.records if record.name == "marble_lightning.callbacks.image_drift"]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


def test_an_ordinary_run_is_logged_without_a_warning_or_a_change(checkpoints, tmp_path, caplog):
    recorder, monitor = Recorder(), ImageDriftMonitor()
    watched, _ = run(checkpoints, tmp_path, MARBLE(), rounds=4, callbacks=[monitor, recorder])
    assert warnings_of(caplog) == []
    assert all(set(metrics) == {f"images/{name}" for name in NAMES} for metrics in recorder.logged)
    for metrics, statistics in zip(recorder.logged, recorder.statistics, strict=True):
        means = statistics.double().mean(0).tolist()
        assert [metrics[f"images/{name}"] for name in NAMES] == pytest.approx(means, abs=1e-6)
    assert monitor.reference == reference_of(recorder.statistics[0])
    plain, _ = run(checkpoints, tmp_path, MARBLE(), rounds=4)
    for expected, actual in zip(plain.trainable, watched.trainable, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("rounds", "patience", "expected"),
    [
        pytest.param((2,), 2, [], marks=pytest.mark.slow),  # one round is not enough
        pytest.param((2, 3), 2, [3], marks=pytest.mark.slow),
        ((1, 2, 3, 4), 2, [2]),  # one warning until it is back in its range
        ((1, 3, 4), 2, [4]),
        ((2, 4), 1, [2, 4]),
    ],
)
def test_rounds_with_a_warning(checkpoints, tmp_path, caplog, rounds, patience, expected):
    run(checkpoints, tmp_path, WeightedSum(), 5, [ImageDriftMonitor(patience=patience)], kind=bleach(*rounds))
    warnings = [text for text in warnings_of(caplog) if "images/brightness" in text]
    assert [text.split(":")[0] for text in warnings] == [f"Round {index}" for index in expected]
    for text in warnings:
        assert "images/brightness = 1.000 is out of the base policy's range, " in text
        assert "model.objective.kl_weight" in text and "`image_drift.factor`" in text
    if expected:
        assert any("images/diversity = 0.000" in text for text in warnings_of(caplog))


def test_an_infinite_factor_never_warns(checkpoints, tmp_path, caplog):
    run(checkpoints, tmp_path, WeightedSum(), 3, [ImageDriftMonitor(factor=math.inf, patience=1)], kind=bleach(1, 2))
    assert warnings_of(caplog) == []


def test_a_resumed_run_keeps_the_reference_and_the_count(checkpoints, tmp_path, caplog):
    kind, file, before = bleach(1, 2, 3), tmp_path / "two_rounds.ckpt", ImageDriftMonitor()
    module, _ = run(checkpoints, tmp_path, WeightedSum(), 2, [before], kind=kind)
    module.trainer.save_checkpoint(file)
    assert warnings_of(caplog) == []
    after = ImageDriftMonitor()
    run(checkpoints, tmp_path, WeightedSum(), 4, [after], kind=kind, ckpt_path=file)
    assert after.reference == before.reference
    assert any(text.startswith("Round 2: images/brightness = 1.000") for text in warnings_of(caplog))
    assert after.outside["brightness"] == 3


def test_a_run_without_a_reference_warns_about_it(checkpoints, tmp_path, caplog):
    module, _ = run(checkpoints, tmp_path, WeightedSum(), 1)
    module.trainer.save_checkpoint(tmp_path / "without.ckpt")
    run(
        checkpoints,
        tmp_path,
        WeightedSum(),
        3,
        [ImageDriftMonitor(patience=1)],
        kind=bleach(2),
        ckpt_path=tmp_path / "without.ckpt",
    )
    (warning,) = warnings_of(caplog)
    assert "the run resumes from a checkpoint without it" in warning
    caplog.clear()
    data = PromptDataModule(str(PROMPTS), ["geneval"], prompts_per_round=1, images_per_prompt=6)
    run(checkpoints, tmp_path, WeightedSum(), 2, [ImageDriftMonitor(patience=1)], kind=bleach(1), data=data)
    (warning,) = warnings_of(caplog)
    assert "the run has one prompt a round" in warning


def test_the_reference_is_over_prompts_and_few_prompts_have_a_wide_spread():
    statistics = torch.tensor([0.0, 0.1, 0.2, 0.3]).double()[:, None].expand(4, len(NAMES))
    mean, spread = reference_of(statistics)["contrast"]
    assert mean == pytest.approx(0.15)
    assert spread == pytest.approx(0.12910 * (3 / 0.58437) ** 0.5, rel=1e-4)  # chi-square of 3 at 0.1, from a table
    assert reference_of(statistics.repeat(100, 1))["contrast"][1] == pytest.approx(0.1118 * 1.05, rel=0.01)
    with pytest.raises(ValueError, match="at least two. Found 1"):
        reference_of(statistics[:1])


@pytest.mark.parametrize(
    ("name", "reference", "factor", "expected"),
    [
        ("brightness", (0.5, 0.1), 2.0, (0.3, 0.7)),
        ("brightness", (0.5, 0.1), 4.0, (0.1, 0.9)),
        ("diversity", (0.2, 0.3), 2.0, (0.05, 0.8)),  # mean - 2 spreads is below 0, so a quarter of the mean is the limit
        ("contrast", (0.3, 0.0), 2.0, (0.28, 0.32)),  # at least 2 MIN_STD
        ("clipping", (0.0, 0.0), 2.0, (-0.1, 0.1)),
        ("contrast", (0.3, 0.1), math.inf, (-math.inf, math.inf)),
    ],
)
def test_ranges(name, reference, factor, expected):
    assert expected_range(name, reference, factor) == pytest.approx(expected)
    assert set(MIN_STD) == set(NAMES)


def test_a_statistic_that_is_not_a_number_is_out_of_range(caplog):
    class LaterTrainer:
        global_step, current_epoch = 1, 3

    monitor = ImageDriftMonitor(patience=1)
    monitor.reference = dict.fromkeys(NAMES, (0.5, 0.1))
    monitor._check(LaterTrainer(), torch.zeros(2, len(NAMES)), dict.fromkeys(NAMES, 0.5) | {"contrast": math.nan})
    (warning,) = warnings_of(caplog)
    assert "images/contrast = nan" in warning


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="`image_drift.factor` must be > 0. Found nan"):
        ImageDriftMonitor(factor=math.nan)
    with pytest.raises(ValueError, match="`image_drift.patience` must be >= 1. Found 0"):
        ImageDriftMonitor(patience=0)
