"""Finished runs: their curves, images and held-out scores."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from balancers import CADENCE
from marble_lightning.evaluation.results import read
from marble_lightning.evaluation.statistics import Summary, changes, summarise
from marble_lightning.run_folder import RESULTS


class Curve(NamedTuple):
    """The values logged under one name, and their optimizer steps."""

    steps: list[int]
    values: list[float]


class Run:
    """A run's folder.

    Args:
        folder: The folder that `fit` prints at its end, with `results.json` and TensorBoard's event files.

    Raises:
        ValueError: The folder has no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / RESULTS).exists():
            raise ValueError(f"`folder` must be a finished run's, with {RESULTS}. Found none in {self.folder.resolve()}.")

    @cached_property
    def _events(self) -> EventAccumulator:
        return EventAccumulator(str(self.folder), size_guidance={"scalars": 0, "images": 0}).Reload()

    def curve(self, name: str) -> Curve:
        """All values of one TensorBoard curve; empty if it was not logged."""
        known = name in self._events.Tags()["scalars"]
        events = self._events.Scalars(name) if known else []
        return Curve([event.step for event in events], [event.value for event in events])

    def images(self, name: str) -> list[Image.Image]:
        """All images logged under a name, in the order of logging; empty if there are none."""
        events = self._events.Images(name) if name in self._events.Tags()["images"] else []
        return [Image.open(io.BytesIO(event.encoded_image_string)) for event in events]

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """The content of results.json: settings, the evaluated model, means by set and reward, scores of each prompt."""
        return read(self.folder)

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """Facts of the evaluated policy: model, adapter, checkpoint, and after `fit` the balancer and its cadence."""
        facts: Mapping[str, Any] = self.results["judged"]
        return facts

    @property
    def balancer(self) -> str:
        """The balancer and the cadence of the run, such as `MARBLE, refresh_every 5, ema_decay 0.7, ...`."""
        cadence = [f"{name} {self.evaluated[name]}" for name in CADENCE if self.evaluated.get(name) is not None]
        return ", ".join([self.evaluated.get("balancer", "not named in its results.json"), *cadence])

    @property
    def reward_models(self) -> list[str]:
        """Names of the rewards and metrics that scored held-out images."""
        return list(self.results["rewards"])

    @property
    def base(self) -> Tensor | None:
        """Held-out scores (prompt, reward) of the base, NaN where a reward does not apply; None if it was not evaluated."""
        return self._scores("base") if "base" in self.results["prompts"][0] else None

    @property
    def trained(self) -> Tensor:
        """Held-out scores (prompt, reward) of the trained policy, NaN where a reward does not apply."""
        return self._scores("scores")

    def _scores(self, key: str) -> Tensor:
        rows = [[prompt[key].get(name, torch.nan) for name in self.reward_models] for prompt in self.results["prompts"]]
        return torch.tensor(rows)


class Comparison(NamedTuple):
    """Held-out scores of one reward in several runs of a method; each prompt's scores are averaged over the runs first."""

    base: Summary
    trained: Summary
    change: Summary


def compare(runs: list[Run]) -> dict[str, Comparison]:
    """Held-out scores before and after training, by reward, of runs that differ only in their seed.

    Raises:
        ValueError: A run has no scores of the base (`num_sanity_val_steps: -1` evaluates it).
    """
    if missing := [str(run.folder) for run in runs if run.base is None]:
        raise ValueError(
            f"The base must have been evaluated. Found no scores of it in {missing[0]}; use `num_sanity_val_steps: -1`."
        )
    base, trained = (torch.stack([getattr(run, name) for run in runs]).mean(0) for name in ("base", "trained"))
    columns = zip(runs[0].reward_models, base.T, trained.T, changes(base, trained), strict=True)
    return {name: Comparison(summarise(before), summarise(after), change) for name, before, after, change in columns}
