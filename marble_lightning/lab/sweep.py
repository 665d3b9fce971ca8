"""Sweeps: variants of a configuration, each fitted with several seeds."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marble_lightning.lab.jobs import Job
from marble_lightning.lab.launchers import Launcher, Local, Slurm, in_use
from marble_lightning.lab.sweep_table import follow
from marble_lightning.utils.validation import require

TAKEN = re.compile(r"\.+|slurm|(version|seed)_\d+(_\d+)?")
"""Names of folders that are none of a variant: of parents, of submitit, of runs and of seeds."""


@dataclass(frozen=True)
class Variant:
    """What distinguishes the runs of one variant.

    Args:
        configs: Configurations, as for `-c`, after those of all runs.
        settings: Settings, as in a configuration file.
    """

    configs: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)  # not dict[str, Any], in which the parser builds classes


def sweep(
    folder: Path,
    configs: list[str],
    variants: dict[str, Variant],
    seeds: list[int],
    settings: dict | None = None,  # see Variant.settings
    jobs: int = 1,
    threads: int | None = None,
    slurm: dict[str, Any] | None = None,
) -> None:
    """Fit every variant with every seed, each in a process of its own.

    Run the same command again after a stop: finished runs are not repeated, interrupted ones resume from their last round.
    A run that fails does not stop the others. Each has the folder FOLDER/VARIANT/seed_N, with its messages in output.txt.

    Args:
        folder: Folder of all runs.
        configs: Configurations of all runs, as for `-c`, such as [tiny, balancers/mgda].
        variants: Configurations and settings of each variant by its name; `{}` for none.
        seeds: Seeds of each variant; `seed_everything` of the runs.
        settings: Settings of all runs, as in a configuration file, without `trainer.logger`.
        jobs: Number of runs at a time, >= 1.
        threads: CPU threads of each run; null for the machine's default.
        slurm: Options of a SLURM job for submitit, such as {slurm_partition: gpu, gpus_per_node: 1, timeout_min: 600}; null
            runs on this machine.

    Raises:
        ValueError: A name, number or configuration is wrong, or the folder has runs with other settings.
        SystemExit: Some runs failed, or the sweep was stopped.
    """
    check_variants(variants, settings or {})
    require(bool(variants) and bool(seeds), "A sweep needs variants and seeds", f"{len(variants)} and {len(seeds)}")
    require(len(set(seeds)) == len(seeds) and min(seeds) >= 0, "`seeds` must be different numbers >= 0", seeds)
    require(jobs >= 1, "`jobs` must be >= 1", jobs)
    planned = plan(folder, configs, variants, seeds, settings or {})
    for job in planned:
        job.check_earlier_runs()
        require(not in_use(job.output), "A sweep must not be started twice", f"{job.name}, which is still running")
    launcher: Launcher = Local(jobs, threads) if slurm is None else Slurm(jobs, threads, folder / "slurm", slurm)
    for job in {job.variant: job for job in planned if not job.finished}.values():
        job.check()
    for job in planned:  # only now, so that a refused sweep leaves nothing behind
        job.prepare()
    sys.exit(follow(planned, launcher))


def check_variants(variants: dict[str, Variant], settings: dict[str, Any]) -> None:
    """Check the names of variants, and that the logger is left to the sweep, which needs it in each run's folder.

    Raises:
        ValueError: A name has other characters or means another folder, or settings have a logger.
    """
    for name, variant in variants.items():
        require(
            bool(re.fullmatch(r"[\w.+-]+", name)), "A variant's name must be letters, digits, and any of _.+-", repr(name)
        )
        require(not TAKEN.fullmatch(name), "A variant's name must not be that of another folder of a sweep", repr(name))
        trainer = merged(settings, variant.settings).get("trainer")
        if isinstance(trainer, dict) and "logger" in trainer:
            raise ValueError(
                f"The settings of {name} must have no `trainer.logger`, since each run logs to TensorBoard in its own "
                f"folder. Found {trainer['logger']}; remove it."
            )


def plan(
    folder: Path, configs: list[str], variants: dict[str, Variant], seeds: list[int], settings: dict[str, Any]
) -> list[Job]:
    """The jobs of a sweep: all variants with the first seed, then with the second, and so on."""
    jobs = []
    for seed in seeds:
        for name, variant in variants.items():
            place = folder / name / f"seed_{seed}"
            logger = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(place.parent), "name": place.name},
            }
            own = merged(merged(settings, variant.settings), {"seed_everything": seed, "trainer": {"logger": logger}})
            text = yaml.safe_dump(own, sort_keys=False)
            jobs.append(Job(name, seed, place, [*configs, *variant.configs], text))
    return jobs


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The settings of both; the second decides.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})
    {'a': {'b': 3, 'c': 2}, 'd': 4}
    """
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], dict) and isinstance(second[name], dict):
            both[name] = merged(first[name], second[name])
    return both
