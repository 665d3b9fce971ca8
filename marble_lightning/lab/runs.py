"""Finished runs: their curves, images and held-out scores."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from balancers import CADENCE
from marble_lightning.evaluation.results import read
from marble_lightning.evaluation.statistics import Summary, changes, summarise
from marble_lightning.utils.run_files import CONFIG, RESULTS


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
    def folders(self) -> list[Path]:
        """Those of the interrupted runs that this one resumes, oldest first, and its own."""
        folders = [self.folder]
        while earlier := resumed(folders[0]):
            folders.insert(0, earlier)
        return folders

    @cached_property
    def _all_events(self) -> list[EventAccumulator]:
        return [events_of(folder) for folder in self.folders]

    def load(self) -> None:
        """Read all curves now; otherwise they are read when the first one is needed."""
        _ = self._all_events

    def _logged(self, kind: str, name: str) -> dict[int, Any]:
        """What was logged under a name by optimizer step, from the first round on if the run was resumed."""
        logged: dict[int, Any] = {}
        for events in self._all_events:
            if name in events.Tags()[kind]:
                found = getattr(events, kind.capitalize())(name)
                logged = {step: event for step, event in logged.items() if step < found[0].step}
                logged |= {event.step: event for event in found}
        return logged

    def curve(self, name: str) -> Curve:
        """All values of one TensorBoard curve, of all parts of a resumed run; empty if not logged."""
        found = self._logged("scalars", name)
        return Curve(list(found), [event.value for event in found.values()])

    def images(self, name: str) -> list[Image.Image]:
        """All images logged under a name, of all parts of a resumed run; empty if there are none."""
        found = self._logged("images", name).values()
        return [Image.open(io.BytesIO(event.encoded_image_string)) for event in found]

    @property
    def distance(self) -> float | None:
        """Mean squared distance to the base's velocity in the last tenth of the steps (`kl`); None if not logged."""
        distances = self.curve("kl").values
        last = distances[-max(1, len(distances) // 10) :]
        return sum(last) / len(last) if last else None

    def sheet(self, step: int) -> Path | None:
        """The file of held-out images after an optimizer step, 0 for the base; None if no part of the run has it.

        A resumed run does not evaluate the base again, so its images are in the folder of an earlier part.
        """
        files = (folder / f"held_out_{step:06d}.png" for folder in reversed(self.folders))
        return next(filter(Path.is_file, files), None)

    @property
    def trained_sheet(self) -> Path | None:
        """The file of held-out images of the evaluated policy; the last one where results.json does not name its step."""
        if (step := self.evaluated.get("optimizer_step")) is not None:
            return self.sheet(step)
        files = [file for folder in self.folders for file in folder.glob("held_out_*.png") if file != self.sheet(0)]
        return max(files, key=lambda file: file.name, default=None)

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """The content of results.json: settings, the evaluated model, means by set and reward, scores of each prompt."""
        return read(self.folder)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.yaml; empty if the run was started in Python."""
        return config_of(self.folder)

    @property
    def seed(self) -> int | None:
        """The seed of the run, `seed_everything`."""
        return self.config.get("seed_everything")

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards that it was trained on; config.yaml has null for those that were dropped."""
        rewards: Mapping[str, Any] = self.config.get("model", {}).get("rewards") or {}
        return [name for name, reward in rewards.items() if reward is not None]

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """Facts of the evaluated policy: model, adapter, checkpoint, and after `fit` the balancer and its cadence."""
        facts: Mapping[str, Any] = self.results.get("evaluated", {})
        return facts

    @property
    def command(self) -> str:
        """The command that wrote the results: fit, validate or test; results of earlier versions count as those of fit."""
        return self.evaluated.get("command") or "fit"

    @property
    def balancer(self) -> str:
        """The balancer and the cadence of the run, such as `MARBLE, refresh_every 5, ema_decay 0.7, ...`."""
        cadence = [f"{name} {self.evaluated[name]}" for name in CADENCE if self.evaluated.get(name) is not None]
        return ", ".join([self.evaluated.get("balancer", "not named in its results.json"), *cadence])

    @property
    def peak_memory(self) -> Mapping[str, Any] | None:
        """`gib` and `of`, GPU or process, of the last part of a resumed run; None in results of earlier versions."""
        return self.results.get("peak_memory")

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


def events_of(folder: Path) -> EventAccumulator:
    """All scalars and images that were logged in a folder."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def config_of(folder: Path) -> Mapping[str, Any]:
    """The content of a folder's config.yaml; empty if it has none."""
    file = folder / CONFIG
    found: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def resumed(folder: Path) -> Path | None:
    """The folder of the run that the run of a folder has resumed, or None if it began with the first round."""
    checkpoint = config_of(folder).get("ckpt_path")
    if checkpoint is None:
        return None
    if checkpoint != "last":
        return Path(checkpoint).parents[1]
    earlier = [other for other in earlier_versions(folder) if (other / "checkpoints").exists()]
    return max(earlier, key=version, default=None)


def earlier_versions(folder: Path) -> list[Path]:
    """The folders `version_N` beside a folder `version_M` with N < M."""
    return [other for other in folder.parent.glob("version_*") if 0 <= version(other) < version(folder)]


def version(folder: Path) -> int:
    """The N of a folder `version_N`, -1 for another name."""
    return int(match[1]) if (match := re.fullmatch(r"version_(\d+)", folder.name)) else -1


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
