"""Lengths of the rewards' gradients: `python -m benchmarks.gradient_norms RUN ...`.

For each run and reward: the norm of its gradient, divided by the mean over rewards at the same refresh or probe; mean over
these and standard error. A method that finds weights for unit gradients, such as MARBLE, multiplies raw gradients with them
between refreshes, so a reward counts for more or less than it was meant to by this factor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.stage_tables import table
from marble_lightning.evaluation.statistics import summarise
from marble_lightning.lab.runs import Run


def relative_norms(run: Run) -> dict[str, str]:
    """Relative length of each reward's gradient, mean ± standard error, for people.

    Raises:
        ValueError: The run has logged none.
    """
    norms = {name: run.curve(f"gradient_norms/{name}").values for name in run.rewards}
    if not all(norms.values()):
        raise ValueError(f"A run must log norms of gradients. Found none in {run.folder}: its balancer has no refreshes.")
    lengths = torch.tensor(list(norms.values()))
    summaries = [summarise(row) for row in lengths / lengths.mean(0)]
    return {name: f"{each.mean:.2f} ± {each.error:.2f}" for name, each in zip(norms, summaries, strict=True)}


def norms_table(runs: Sequence[Run]) -> str:
    """The relative lengths, a run a row."""
    found = {run.folder.as_posix(): relative_norms(run) for run in runs}
    names = list(dict.fromkeys(name for norms in found.values() for name in norms))
    return table(["run", *names], [[run, *(norms.get(name, "-") for name in names)] for run, norms in found.items()])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    try:
        print(norms_table([Run(folder) for folder in parser.parse_args().runs]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
