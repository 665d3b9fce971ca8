"""How far runs differ that only chance tells apart: `python -m benchmarks.noise_floor --seeds 0 1 2 3 4 --jobs 2`.

For each reward: the held-out change by a method, its standard deviation over seeds, its standard error over the prompts of a
seed, and how far it moves if the first seed runs again with other rounding: on two threads, and with other matrix products.
A difference of methods that is not well above these figures is none. Runs and results are those of `benchmarks.methods`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.fits import ComparisonError, Folders, Result, changes_of, fit_all
from benchmarks.methods import METHODS, run_of
from benchmarks.stage_tables import number, table
from benchmarks.stages import STAGES, add_run_options, read_stages
from marble_lightning.evaluation.statistics import summarise

ROUNDINGS: dict[str, dict[str, str]] = {
    "threads_2": {"OMP_NUM_THREADS": "2"},
    "mkl_compatible": {"MKL_CBWR": "COMPATIBLE"},
}
"""Environments in which a run rounds differently: on two threads, and with the matrix products that every x86 processor can
compute, instead of those for this processor; builds of torch without MKL ignore the second."""


def noise_table(results: Sequence[Result], roundings: Mapping[str, Result], names: Sequence[str]) -> str:
    """Each reward's change, what varies it, and its difference under other rounding.

    Args:
        results: Figures of one method's runs, by seed.
        roundings: Figures of the first run with other rounding, by its name.
        names: Rewards and metrics, one a row.
    """
    changes = changes_of(results, names)
    others = changes_of(list(roundings.values()), names) - changes[0]
    rows = []
    for column, name in enumerate(names):
        means = changes[:, :, column].nanmean(1)
        deviation = float(means.std()) if len(means) > 1 else None
        errors = [summarise(change).error for change in changes[:, :, column]]
        moved = [f"{float(other):+.4f}" for other in others[:, :, column].nanmean(1)]
        rows.append([name, f"{means.mean():+.4f}", number(deviation), number(sum(errors) / len(errors)), *moved])
    return table(["reward", "change", "std over seeds", "error over prompts", *roundings], rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", default="published", choices=STAGES)
    parser.add_argument("--method", default="marble", choices=list(METHODS), metavar="METHOD")
    add_run_options(parser, "methods", [0, 1, 2, 3, 4])
    options, extra = parser.parse_known_args()
    stages = read_stages()
    rounds = options.rounds or stages.rounds
    fits = [run_of(stages, options.stage, options.method, seed, rounds, extra) for seed in options.seeds]
    again = [
        replace(fits[0], name=f"{fits[0].name}_{name}", environment=tuple(variables.items()))
        for name, variables in ROUNDINGS.items()
    ]
    names = [*stages.members[options.stage], *stages.metrics]
    try:
        results = fit_all([*fits, *again], Folders(options.folder, options.results), options.jobs)
        print(noise_table(results[: len(fits)], dict(zip(ROUNDINGS, results[len(fits) :], strict=True)), names))
    except ComparisonError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
