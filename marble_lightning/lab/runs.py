"""A finished run, read back: its curves, images and held-out scores."""

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
    """What was logged under one name: optimizer steps and values."""

    steps: list[int]
    values: list[float]


class Run:
    """A run's folder.

    Args:
        folder: The one `fit` names at its end, with `results.json` and TensorBoard's events.

    Raises:
        ValueError: There is no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / RESULTS).exists():
            raise ValueError(f"`folder` must be a finished run's, with {RESULTS}. Found none in {self.folder.resolve()}.")

    @cached_property
    def _events(self) -> EventAccumulator:
        return EventAccumulator(str(self.folder), size_guidance={"scalars": 0, "images": 0}).Reload()

    def curve(self, name: str) -> Curve:
        """All values of one TensorBoard curve; empty where it was not logged."""
        known = name in self._events.Tags()["scalars"]
        events = self._events.Scalars(name) if known else []
        return Curve([event.step for event in events], [event.value for event in events])

    def images(self, name: str) -> list[Image.Image]:
        """All images logged under a name, the first one first; empty where there are none."""
        events = self._events.Images(name) if name in self._events.Tags()["images"] else []
        return [Image.open(io.BytesIO(event.encoded_image_string)) for event in events]

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """What results.json holds: settings, what was judged, means by set and reward, and the scores of each prompt."""
        return read(self.folder)

    @property
    def balancer(self) -> str:
        """What merged the rewards, and the cadence that ran: `MARBLE, refresh_every 5, ema_decay 0.7, ...`."""
        judged = self.results["judged"]
        cadence = [f"{name} {judged[name]}" for name in CADENCE if judged.get(name) is not None]
        return ", ".join([judged.get("balancer", "not said in its results.json"), *cadence])

    @property
    def reward_models(self) -> list[str]:
        """Names of the rewards and metrics that judged held-out images."""
        return list(self.results["rewards"])

    @property
    def base(self) -> Tensor | None:
        """Held-out scores (prompt, judge) of the base, NaN where a judge does not apply; None if it was not measured."""
        return self._scores("base") if "base" in self.results["prompts"][0] else None

    @property
    def trained(self) -> Tensor:
        """The same of the trained policy."""
        return self._scores("scores")

    def _scores(self, whose: str) -> Tensor:
        rows = [[prompt[whose].get(name, torch.nan) for name in self.reward_models] for prompt in self.results["prompts"]]
        return torch.tensor(rows)


class Comparison(NamedTuple):
    """One judge's held-out scores in several runs of one method: each prompt's mean over the runs is taken first."""

    base: Summary
    trained: Summary
    change: Summary


def compare(runs: list[Run]) -> dict[str, Comparison]:
    """Held-out scores before and after, by judge, of runs that differ in their seed only.

    Raises:
        ValueError: A run's base was not measured (`num_sanity_val_steps: -1` does).
    """
    if missing := [str(run.folder) for run in runs if run.base is None]:
        raise ValueError(f"The base must have been measured (`num_sanity_val_steps: -1`). Found none in {missing[0]}.")
    base, trained = (torch.stack([getattr(run, when) for run in runs]).mean(0) for when in ("base", "trained"))
    columns = zip(runs[0].reward_models, base.T, trained.T, changes(base, trained), strict=True)
    return {name: Comparison(summarise(before), summarise(after), change) for name, before, after, change in columns}
