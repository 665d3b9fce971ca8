"""Checks of a run's callbacks, and of the metrics that they monitor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from marble_lightning.checkpoints.files import warn
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.image_statistics import NAMES

UNUSABLE: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "accumulation follows from the size of a round; use `model.optimizer_steps_per_round`",
    BatchSizeFinder: "it tries batches of another kind; use `model.micro_batch_size`, and `memory` to estimate what fits",
    LearningRateFinder: "it trains on parts of a round; use `model.optimizer.lr`",
    StochasticWeightAveraging: "it replaces all adapters at the end; use `model.averaging.ema_decay`",
    WeightAveraging: "it replaces all adapters in validations and checkpoints; use `model.averaging.ema_decay`",
    ModelPruning: "it renames the weights that checkpoints hold; use `model.policy.rank` for fewer parameters",
}
"""Callbacks that change the micro-batches of a round or the adapters, each with the reason and the remedy."""

KNOWN_PACKAGES = ("lightning", "balancers", "marble_lightning")
"""Packages with callbacks that log only metrics listed by `metric_names`; `LearningRateMonitor` is the exception."""


def check_trainer(enable_checkpointing: bool | None, added: Iterable[object], sections: Mapping[str, object]) -> None:
    """Refuse settings of the trainer that conflict with the callbacks of the command line.

    Args:
        enable_checkpointing: As in `trainer`.
        added: The callbacks in `trainer.callbacks`.
        sections: The callbacks that have their own section of settings, by the name of the section.

    Raises:
        ValueError: `enable_checkpointing` is false, or an added callback has a section of settings.
    """
    if enable_checkpointing is False:
        raise ValueError(
            "`trainer.enable_checkpointing` must be true or null, since the result of a run is its checkpoint. Found false; "
            "use `checkpoints.every_n_rounds` for fewer checkpoints."
        )
    for callback in added:
        for section, existing in sections.items():
            if type(callback) is type(existing):
                raise ValueError(
                    f"`trainer.callbacks` must not add a callback that has a section of settings. Found "
                    f"{type(existing).__name__}; use `{section}`."
                )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that change the micro-batches of a round or the adapters."""
    for callback in callbacks:
        for kind, reason in UNUSABLE.items():
            if isinstance(callback, kind):
                raise ValueError(f"`trainer.callbacks` must not add a {kind.__name__}. Found one: {reason}.")


def metric_names(module: Any) -> set[str]:
    """Names of the metrics that every round of a `DiffusionNFT` logs, including those of validations if there are any."""
    trainer, evaluator = module.trainer, module.evaluator
    per_reward = {f"{kind}/{name}" for kind in ("train", "missing", "skipped", "time/scoring") for name in module.rewards}
    times = {f"time/{phase}" for phase in ("encoding", "sampling", "waiting_for_scores", "training")}
    plain = {"loss", *times, *(f"images/{name}" for name in NAMES)}
    kl = {"kl"} if module.objective.kl_weight else set[str]()
    held_out = evaluator.metric_names(get_datamodule(trainer).held_out) if trainer.limit_val_batches else set[str]()
    return per_reward | plain | kl | held_out


def check_monitors(callbacks: Iterable[Callback], module: LightningModule, names: Iterable[str]) -> None:
    """Refuse an EarlyStopping or ModelCheckpoint that monitors an unknown metric, or a score with `mode: min`.

    The first would end the run after one round. The second, Lightning's default, would stop because a score rises, and keep
    the checkpoint with the lowest score. Custom callbacks and modules may log other metrics. If the run has one, an unknown
    metric is only warned of.

    Args:
        callbacks: All callbacks of the run.
        module: The trained module.
        names: The metrics that the run logs.

    Raises:
        ValueError: The metric is unknown, and the run has no custom callback or module; or the mode is wrong.
    """
    known: set[str] = {*names, "epoch", "step"}
    custom = [type(part).__name__ for part in (*callbacks, module) if _may_log(part)]
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or callback.monitor is None:
            continue
        if callback.monitor in known:
            _check_mode(callback)
            continue
        close = get_close_matches(callback.monitor, known, n=3) or sorted(known)
        text = f"one of the metrics that the run logs. Found {callback.monitor!r}; use e.g. {', '.join(close)}."
        if not custom:
            raise ValueError(f"`monitor` of {type(callback).__name__} must be {text}")
        warn(f"Unless {' or '.join(custom)} logs it, `monitor` of {type(callback).__name__} must be {text}")


def _check_mode(callback: EarlyStopping | ModelCheckpoint) -> None:
    if str(callback.monitor).startswith(("held_out/", "train/")) and callback.mode == "min":
        raise ValueError(
            f"`mode` of {type(callback).__name__} must be max where it monitors a score, since higher is better. Found min, "
            f"the default, for {callback.monitor!r}; use `mode: max`."
        )


def _may_log(part: object) -> bool:
    package = type(part).__module__.partition(".")[0]
    return package not in KNOWN_PACKAGES or isinstance(part, LearningRateMonitor)
