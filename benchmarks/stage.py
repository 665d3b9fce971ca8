"""What a stage is, in numbers: `python -m benchmarks.stage`.

First, from images of the base for held-out prompts: scores, the spread of each reward among the images of a prompt, and the
correlations of rewards among them. `--base` ends here. Then the transfer matrix: a run trains on reward i alone, and
held-out images tell how every reward j changes, with standard errors over seeds and prompts. A significant fall is a
trade-off.

The runs on single rewards, the specialists, serve all stages and the normalised gains of `benchmarks.methods`. All figures
are kept in `--results`; what is there is not computed again. Other options are passed to `fit` and `predict`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.before_after import records
from benchmarks.fingerprint import fingerprint
from benchmarks.fits import ComparisonError, Folders, call_marble, changes_of, fit_all, read, write
from benchmarks.stage_figures import base_figures, transfer_matrix
from benchmarks.stage_tables import (
    base_table,
    correlations_table,
    trade_offs_text,
    transfer_table,
    write_heat_map,
)
from benchmarks.stages import STAGES, Stages, add_run_options, options_of, read_stages, specialists


def base_of(stages: Stages, folders: Folders, prompts: int, images: int, extra: Sequence[str]) -> dict[str, Any]:
    """The base's figures, from `base_figures`: sampled once, and then read from the results.

    Args:
        stages: All stages; every reward and metric scores.
        folders: Where images and results are.
        prompts: Held-out prompts of each source.
        images: Images of each prompt, >= 2.
        extra: Further arguments of `predict`.
    """
    options = ["--data.held_out_per_source", str(prompts), "--data.predict_images", str(images), *extra]
    arguments = [*stages.training_on(list(stages.rewards)), *options]
    identity = {"options": options, "fingerprint": fingerprint(arguments)}
    file = folders.results / f"base_{prompts}_{images}.json"
    if figures := read(file, identity):
        return figures
    output = folders.runs / file.stem
    call_marble(
        ["predict", *arguments, "--predictions.folder", str(output), "--trainer.logger", "false"],
        folders.runs / f"{file.stem}.txt",
        "the base's images",
    )
    names = [*stages.rewards, *stages.metrics]
    write(file, {**identity, **base_figures(records(output), images, names)})
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def transfer(stages: Stages, names: Sequence[str], options: argparse.Namespace, extra: Sequence[str]) -> list[Tensor]:
    """Changes (seed, prompt, reward) by the runs on each of these rewards alone; columns: the rewards, then all others."""
    rounds = options.rounds or stages.rounds
    fits = specialists(stages, names, options.seeds, options_of(rounds, extra), rounds)
    results = fit_all(fits, Folders(options.folder, options.results), options.jobs)
    columns = measured(stages, names)
    return [changes_of(results[index :: len(names)], columns) for index in range(len(names))]


def measured(stages: Stages, names: Sequence[str]) -> list[str]:
    """These rewards, then all other rewards and metrics."""
    return list(dict.fromkeys([*names, *stages.rewards, *stages.metrics]))


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of `fit`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", action="store_true", help="only the base, nothing is trained")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    add_run_options(parser, "stage", [0, 1])
    parser.add_argument("--prompts", type=int, default=42, help="held-out prompts of each source, for the base")
    parser.add_argument("--images", type=int, default=8, help="images of each, for the base")
    parser.add_argument("--figure", type=Path, help="heat map of the transfer matrix, such as docs/transfer.png")
    options, extra = parser.parse_known_args()
    if options.images < 2:
        parser.error(f"`--images` must be >= 2: a spread needs several images of a prompt. Found {options.images}.")
    return options, extra


def main() -> None:
    """Print the tables."""
    options, extra = parse()
    try:
        report(read_stages(), options, extra)
    except ComparisonError as error:
        sys.exit(f"error: {error}")


def report(stages: Stages, options: argparse.Namespace, extra: Sequence[str]) -> None:
    """Print each table once its figures are there."""
    members = {stage: stages.members[stage] for stage in options.stages}
    base = base_of(stages, Folders(options.folder, options.results), options.prompts, options.images, extra)
    print(base_table(base, members), "Correlations within a prompt:", correlations_table(base), sep="\n\n")
    if options.base:
        return
    names = stages.union(options.stages)
    changes = transfer(stages, names, options, extra)
    matrix = transfer_matrix(changes)
    square = [row[: len(names)] for row in matrix]
    print(f"\nTransfer, {len(options.seeds)} seeds, {changes[0].shape[1]} held-out prompts:\n")
    print(transfer_table(matrix, names, measured(stages, names)), trade_offs_text(square, names, members), sep="\n\n")
    if options.figure:
        write_heat_map(square, names, options.figure)
        print(f"\nHeat map: {options.figure}")


if __name__ == "__main__":
    main()
