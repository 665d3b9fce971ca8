"""Finds the runs of a report, and checks that they can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from marble_lightning.evaluation.comparison import scorer_differences
from marble_lightning.lab.report.comparable import (
    check_base,
    check_evaluation,
    check_same,
    notes_on_settings,
    notes_on_training,
)
from marble_lightning.lab.report.progress import progress
from marble_lightning.lab.runs import Run, config_of, earlier_versions
from marble_lightning.utils.run_files import CONFIG, RESULTS, SWEEP
from marble_lightning.utils.validation import require

NUMBERED = re.compile(r"(version|seed)_\d+(_\d+)?")
OF_EVALUATIONS = {"verbose", "return_predictions"}
"""Settings that only validate, test and predict have."""


@dataclass
class Collection:
    """The runs of a report.

    Attributes:
        methods: Runs on several rewards, by method and seed.
        specialists: Runs on a single reward, by reward and seed.
        unfinished: Folders of runs without results, which are left out.
        notes: What a reader must know before comparing: results that are left out, other rewards, rounds, learning rates
            or settings of reward models.
    """

    methods: dict[str, dict[int, Run]] = field(default_factory=dict)
    specialists: dict[str, dict[int, Run]] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs on several rewards."""
        return [run for seeds in self.methods.values() for run in seeds.values()]

    @property
    def examples(self) -> dict[str, Run]:
        """A run of each method whose images are shown: with the lowest seed that all have, or else its own lowest seed."""
        common = set.intersection(*map(set, self.methods.values()))
        return {method: seeds[min(common or seeds)] for method, seeds in self.methods.items()}

    @property
    def everything(self) -> list[Run]:
        """All runs, on several rewards and on single ones."""
        return [*self.runs, *(run for seeds in self.specialists.values() for run in seeds.values())]

    @property
    def groups(self) -> dict[str, list[Run]]:
        """The runs of each method, and of each reward alone."""
        alone = {f"{name} alone": list(seeds.values()) for name, seeds in self.specialists.items()}
        return {name: list(seeds.values()) for name, seeds in self.methods.items()} | alone

    @property
    def rewards(self) -> list[str]:
        """Rewards that some method was trained on and that all runs have scores of, in the order of the first run."""
        trained = dict.fromkeys(name for run in self.runs for name in run.rewards)
        return [name for name in trained if all(name in run.reward_models for run in self.runs)]

    @property
    def columns(self) -> list[str]:
        """The rewards, then the metrics that all runs have scores of."""
        rest = [name for name in self.runs[0].reward_models if name not in self.rewards]
        return [*self.rewards, *(name for name in rest if all(name in run.reward_models for run in self.runs))]

    def changes(self, method: str, seeds: Sequence[int] | None = None) -> Float[Tensor, "seed prompt column"]:
        """Held-out changes of a method, by its seeds or some of them."""
        runs = self.methods[method]
        return torch.stack([changes(runs[seed], self.columns) for seed in (runs if seeds is None else seeds)])

    def used_seeds(self, reward: str) -> list[int]:
        """The seeds of a specialist that are used: as many as the specialist with the fewest has."""
        fewest = min(len(self.specialists[name]) for name in self.rewards)
        return list(self.specialists[reward])[:fewest]

    def changes_of_specialists(self) -> Float[Tensor, "seed prompt reward"] | None:
        """Change of each reward by the runs on it alone; None if a reward has no run."""
        if any(name not in self.specialists for name in self.rewards):
            return None
        alone = [[self.specialists[name][seed] for seed in self.used_seeds(name)] for name in self.rewards]
        columns = zip(self.rewards, alone, strict=True)
        return torch.stack([torch.stack([changes(run, [name])[:, 0] for run in runs]) for name, runs in columns], dim=2)


def changes(run: Run, columns: Sequence[str]) -> Float[Tensor, "prompt column"]:
    """Changes of the held-out scores of one run."""
    order = [run.reward_models.index(name) for name in columns]
    base = run.base
    assert base is not None  # `collect` takes no others
    return (run.trained - base)[:, order].double()


def collect(places: Sequence[Path]) -> Collection:
    """Find all finished runs in some folders.

    A run's method is the name of its folder in them, without `seed_N` and `version_N`.

    Raises:
        ValueError: There is no finished run; two have the same method and seed; or their evaluations differ.
    """
    found, begun = Collection(), list[Path]()
    for place in places:
        require(place.is_dir(), "A report needs folders of runs", f"{place}, which is no folder")
        begun += (of_place := sorted(begun_in(place)))
        runs = [Run(file.parent) for file in sorted(place.rglob(RESULTS))]
        fits = [run for run in progress(runs, f"Reading {place}", "run") if run.command == "fit"]
        require(bool(fits), "A report needs finished runs", f"none in {place}, and {len(of_place)} that have not finished")
        found.notes += [f"Left out, since `{run.command}` wrote it: {run.folder}." for run in runs if run.command != "fit"]
        for run in fits:
            add(found, run, method_of(run.folder, place))
    require(bool(found.methods), "A report needs a run on several rewards", "only runs on single rewards")
    for runs in found.groups.values():
        check_same(runs)
    for run in found.everything[1:]:
        check_base(found.runs[0], run)
        check_evaluation(found.runs[0], run)
    require(bool(found.rewards), "The runs of a report must have a reward in common", "none")
    done = {folder.resolve() for run in found.everything for folder in [run.folder, *continued(run)]}
    found.unfinished = [folder for folder in begun if folder.resolve() not in done]
    found.notes += [*notes_on_rewards(found), *notes_on_training(found.groups), *notes_on_settings(found.groups)]
    found.notes += notes_on_scorers(found)
    return found


def continued(run: Run) -> list[Path]:
    """Folders of interrupted runs whose work a finished run has done.

    They are those that it resumed, and with `--ckpt_path last` also earlier ones that left no checkpoint to resume.
    """
    last = run.config.get("ckpt_path") == "last"
    empty = [folder for folder in earlier_versions(run.folder) if not (folder / "checkpoints").exists()]
    return [*run.folders[:-1], *(empty if last else [])]


def begun_in(place: Path) -> Iterator[Path]:
    """Folders of all runs that have no results, and those of a sweep's runs that have failed before they had one."""
    folders = [file.parent for file in place.rglob(CONFIG)]
    without = (folder for folder in folders if not (folder / RESULTS).exists())
    yield from (folder for folder in without if OF_EVALUATIONS.isdisjoint(config_of(folder)))
    parents = {parent for folder in folders for parent in folder.parents}
    yield from (file.parent for file in place.rglob(SWEEP) if file.parent not in parents)


def notes_on_rewards(found: Collection) -> list[str]:
    """Methods that were trained on other rewards than the first one, and rewards that not all runs have scores of."""
    (first, seeds), *others = found.methods.items()
    trained = next(iter(seeds.values())).rewards
    notes = []
    for name, runs in others:
        rewards = next(iter(runs.values())).rewards
        if set(rewards) != set(trained):
            notes.append(f"{name} was trained on other rewards than {first}: {', '.join(rewards)}.")
    known = dict.fromkeys(name for run in found.runs for name in run.rewards)
    if missing := [name for name in known if name not in found.rewards]:
        notes.append(f"Not compared, since not all runs have scores of it: {', '.join(missing)}.")
    return notes


def notes_on_scorers(found: Collection) -> list[str]:
    """Reward models whose settings differ between runs, such as the path of their weights."""
    first = found.runs[0]
    differences = {
        difference: run.folder
        for run in found.everything[1:]
        for difference in scorer_differences(first.results, run.results, first.reward_models)
    }
    return [f"Scored with other settings, in {folder}: {difference}." for difference, folder in differences.items()]


def add(found: Collection, run: Run, method: str) -> None:
    """Add a run to the methods, or to the specialists if it has one reward."""
    require(
        run.base is not None, "The base must be evaluated by `fit` (num_sanity_val_steps: -1)", f"no scores in {run.folder}"
    )
    single = len(run.rewards) == 1
    group, name = (found.specialists, run.rewards[0]) if single else (found.methods, method)
    seeds, seed = group.setdefault(name, {}), run.seed or 0
    if seed in seeds:
        raise ValueError(
            f"A report takes one run of each method and seed. Found two of {name}, seed {seed}: {seeds[seed].folder} and "
            f"{run.folder}; name the folders of the runs to be compared."
        )
    seeds[seed] = run


def method_of(folder: Path, place: Path) -> str:
    """The name of a run's method.

    >>> method_of(Path("runs/sweep/marble/seed_0/version_1"), Path("runs/sweep"))
    'marble'
    >>> method_of(Path("runs/tiny/version_3"), Path("runs/tiny/version_3"))
    'tiny'
    """
    parts = [part for part in folder.relative_to(place).parts if not NUMBERED.fullmatch(part)]
    if parts:
        return "/".join(parts)
    named = [part for part in folder.resolve().parts if not NUMBERED.fullmatch(part)]
    return named[-1]
