"""Unsupported callbacks of Lightning are refused with the reason and the remedy."""

from __future__ import annotations

import logging

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)

from marble_lightning.callback_checks import check_callbacks, check_monitors, check_trainer, metric_names
from marble_lightning.callbacks.results_writer import Results
from marble_lightning.checks import WHOLE_ROUNDS
from marble_lightning.module import DiffusionNFT
from tests.helpers.command_line import fit_with, options


class Custom(Callback):
    """A custom callback, which may log any metric."""


MODULE = DiffusionNFT.__new__(DiffusionNFT)
NAMES = {"kl", "train/ocr", "held_out/ocr", "held_out/geneval"}


@pytest.mark.parametrize(
    "callback",
    [
        GradientAccumulationScheduler({0: 2}),
        BatchSizeFinder(),
        LearningRateFinder(),
        StochasticWeightAveraging(0.1),
        EMAWeightAveraging(),
        ModelPruning("l1_unstructured"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_change_rounds_or_adapters_are_refused(callback):
    check_callbacks([Timer(interval="epoch"), EarlyStopping("kl")])
    with pytest.raises(ValueError, match=r"`trainer\.callbacks` must not add a .*; use `m.*`"):
        check_callbacks([callback])


def test_settings_that_conflict_with_the_command_lines_callbacks():
    check_trainer(None, [Timer()], {"results": Results()})
    with pytest.raises(
        ValueError, match=r"`trainer\.enable_checkpointing` must be true or null.*`checkpoints\.every_n_rounds`"
    ):
        check_trainer(False, [], {})
    with pytest.raises(ValueError, match="Found Results; use `results`"):
        check_trainer(True, [Results()], {"results": Results()})


@pytest.mark.parametrize(
    "callback", [EarlyStopping("held_out/orc"), ModelCheckpoint(monitor="held_out/orc")], ids=["stopping", "checkpoint"]
)
def test_unknown_metrics_cannot_be_monitored(callback, caplog):
    with pytest.raises(ValueError, match=r"`monitor` of \w+ must be .* Found 'held_out/orc'; use e\.g\. held_out/ocr,"):
        check_monitors([callback], MODULE, NAMES)
    for other in (Custom(), LearningRateMonitor()):  # these log other names
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_monitors([callback, other], MODULE, NAMES)
        assert f"Unless {type(other).__name__} logs it, `monitor` of" in caplog.text


def test_known_metrics_can_be_monitored():
    known = [EarlyStopping(name, mode="max") for name in NAMES]
    best = [ModelCheckpoint(monitor=name, mode="max") for name in (*NAMES, "step", None)]
    check_monitors([*known, *best, EarlyStopping("kl", mode="min"), ModelCheckpoint(monitor="step")], MODULE, NAMES)


@pytest.mark.parametrize("name", ["held_out/ocr", "train/ocr"])
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_the_lowest_score_is_not_the_best(kind, name):
    with pytest.raises(
        ValueError, match=rf"`mode` of {kind.__name__} must be max .* Found min, .* '{name}'; use `mode: max`"
    ):
        check_monitors([kind(monitor=name)], MODULE, NAMES)


def test_one_micro_batch_is_not_a_whole_round():
    """An option takes a share as float and a number as int: 1 is not 1.0."""
    for name, allowed in WHOLE_ROUNDS.items():
        for value, kind in ((1, int), (True, bool)):
            assert not any(type(default) is kind and default == value for default in allowed), name


class Metrics(Callback):
    """Keeps the names of logged metrics and of known metrics."""

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionNFT) -> None:
        self.logged, self.known = set(trainer.callback_metrics), metric_names(pl_module)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_the_known_metrics_are_those_of_a_run(checkpoints, tmp_path):
    metrics = Metrics()
    fit_with(options(checkpoints, tmp_path, **{"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}), metrics)
    assert metrics.logged == metrics.known
