"""Stages: the rewards of configs/stages, each a set of rewards on the prompts and the base of configs/tiny.yaml."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fingerprint import resolve
from benchmarks.fits import Fit

STAGES = ("published", "aligned", "conflict")
"""Names of the stages."""


@dataclass(frozen=True)
class Stages:
    """The rewards of all stages, which score the held-out images of every run.

    Args:
        members: Names of each stage's rewards.
        rewards: Settings of each reward of any stage.
        metrics: Settings of what no stage trains on.
        rounds: Rounds of a run, `max_epochs`.
    """

    members: Mapping[str, Sequence[str]]
    rewards: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rounds: int

    def training_on(self, names: Sequence[str], stage: str | None = None) -> tuple[str, ...]:
        """Arguments of `fit` that train on these rewards; all other rewards only score held-out images.

        Args:
            names: The rewards to train on.
            stage: The stage whose other settings are used; None for those of configs/tiny.yaml.
        """
        others = {name: settings for name, settings in self.rewards.items() if name not in names}
        model = {"rewards": {name: self.rewards[name] for name in names}, "metrics": {**others, **self.metrics}}
        overlay = [] if stage is None else ["-c", f"stages/{stage}"]
        return ("-c", "tiny", *overlay, "-c", json.dumps({"model": model}))

    def union(self, stages: Iterable[str]) -> list[str]:
        """Rewards of any of these stages."""
        return list(dict.fromkeys(name for stage in stages for name in self.members[stage]))


def combine(settings: Mapping[str, Mapping[str, Any]]) -> Stages:
    """The stages from their resolved settings.

    Args:
        settings: Settings of `fit` by stage.

    Raises:
        ValueError: Stages differ in more than their rewards, or have different rewards under one name.
    """
    rewards: dict[str, Any] = {}
    members, metrics, rounds, first = {}, {}, 0, None
    for stage, config in settings.items():
        own = {name: value for name, value in config["model"]["rewards"].items() if value is not None}
        others = {**config, "model": {name: value for name, value in config["model"].items() if name != "rewards"}}
        if first is not None and others != first:
            keys = [name for name in others if others[name] != first.get(name)]
            raise ValueError(
                f"Stages must differ in `model.rewards` only. Found {stage}, which differs in {', '.join(keys)}."
            )
        if other := [name for name in own if name in rewards and rewards[name] != own[name]]:
            raise ValueError(f"Stages must have the same settings of a reward. Found others of {other[0]} in {stage}.")
        rewards |= own
        members[stage], first = list(own), others
        metrics = {name: value for name, value in (config["model"]["metrics"] or {}).items() if value is not None}
        rounds = config["trainer"]["max_epochs"]
    return Stages(members, rewards, metrics, rounds)


def read_stages() -> Stages:
    """The stages of configs/stages."""
    return combine({stage: resolve("-c", "tiny", "-c", f"stages/{stage}") for stage in STAGES})


def add_run_options(parser: argparse.ArgumentParser, place: str, seeds: Sequence[int]) -> None:
    """Options of commands that run fits and keep their figures.

    Args:
        parser: The command's.
        place: Name of the folders of runs and of figures.
        seeds: Seeds by default.
    """
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--rounds", type=int, help="of a run; otherwise those of configs/tiny.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs", place), help="of the runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results", place), help="of their figures")


def add_specialist_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that divide gains by those of specialists."""
    parser.add_argument("--specialists", type=Path, default=Path("benchmarks/results/stage"), help="results of `stage`")
    parser.add_argument("--specialist-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of these results")


def options_of(rounds: int, extra: Sequence[str]) -> tuple[str, ...]:
    """Arguments of `fit` for a number of rounds, of which the last is evaluated, and further ones."""
    return ("--trainer.max_epochs", str(rounds), "--trainer.check_val_every_n_epoch", str(rounds), *extra)


def specialists(
    stages: Stages, names: Sequence[str], seeds: Sequence[int], options: Sequence[str], rounds: int
) -> list[Fit]:
    """Runs that train on a single reward each, the same for all stages.

    Args:
        stages: All stages.
        names: The rewards.
        seeds: Seeds of the runs.
        options: Arguments of `fit`.
        rounds: Rounds, for the names of the results.
    """
    # with one reward all methods agree, and the sum is the cheapest; the unit of gains keeps the published advantages
    method = ("-c", "balancers/weighted_sum", "--model.objective.advantage_std", "round")
    return [
        Fit(f"specialist_{name}_{rounds}", (*stages.training_on([name]), *method), tuple(options), seed)
        for seed in seeds
        for name in names
    ]
