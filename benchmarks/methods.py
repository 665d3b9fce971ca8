"""Methods that merge rewards, on one stage: `python -m benchmarks.methods --stage published --seeds 0 1 2 --jobs 2`.

Prints the held-out change of each reward with intervals, the normalised gains with the least first, the difference of
the least gains to `--against` with a 99 % interval, and the cosines of the updates with each reward's gradient. Gains are
shares of what the runs on a single reward gain, which `python -m benchmarks.stage` trains.

Each run is a process with one thread. A finished run is not repeated: its figures are kept in `--results`, and are refused
if options, configuration or bundled weights have changed. Other options are passed to `fit`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fits import ComparisonError, Fit, Folders, fit_all, load_all
from benchmarks.method_figure import write_gains_figure
from benchmarks.method_tables import (
    Results,
    Specialists,
    cadences,
    changes_table,
    cosines_table,
    difference_table,
    gains_table,
    stack_specialists,
)
from benchmarks.stages import STAGES, Stages, add_run_options, add_specialist_options, options_of, read_stages, specialists
from marble_lightning.lab.paper import REFERENCE

PROBES = ("--gradient_alignment.probe_every", "5", "--gradient_alignment.fresh", "false")
"""For methods without refreshes: the same figures of alignment, on the images that the update comes from."""
AVERAGED = ("--balancer.gram_decay", "0.9", "--balancer.ema_decay", "0")
"""The Gram matrix is averaged over refreshes instead of its solutions."""
SPLIT = ("--balancer.gram", "split", *AVERAGED)

ABLATIONS = [
    *(("decay", "gram_decay", value) for value in ("0.7", "0.97")),
    *(("floor", "signal_floor", value) for value in ("0.05", "0.5")),
    *(("every", "refresh_every", value) for value in ("2", "10")),
    ("shrinkage", "gram_shrinkage", "false"),
]
"""Name, option and value of each; `split` has 0.9, 0.15, 5 and true."""

METHODS: dict[str, tuple[str, ...]] = {
    "plain_sum": ("-c", "balancers/weighted_sum", "--balancer.reduction", "sum", *PROBES),
    "weighted_sum": ("-c", "balancers/weighted_sum", *PROBES),
    "std_sum": ("-c", "balancers/weighted_sum_std", *PROBES),
    "advantage_sum": ("-c", "balancers/advantage_sum", *PROBES),
    "fixed_weights": ("-c", "balancers/fixed_weights", *PROBES),
    "fixed_weights_normalised": ("-c", "balancers/fixed_weights_normalized"),
    "outcome_guard": ("-c", "balancers/outcome_guard", *PROBES),
    "sequential": ("-c", "balancers/sequential", *PROBES),
    "marble": (),
    "marble_every_10": ("--balancer.refresh_every", "10"),
    "marble_floor": ("--balancer.floor", "0.05"),
    "averaged": AVERAGED,
    "split": SPLIT,
    "pcgrad": ("-c", "balancers/pcgrad"),
    "cagrad": ("-c", "balancers/cagrad"),
    "mgda": ("-c", "balancers/mgda"),
    "gem": ("-c", "balancers/gem"),
    "upgrad": ("-c", "balancers/torchjd"),
    **{
        name: ("-c", "balancers/torchjd", "--balancer.aggregator", aggregator)
        for name, aggregator in {
            "aligned_mtl": "AlignedMTL",
            "nash_mtl": "NashMTL",
            "imtl_g": "IMTLG",
            "gradvac": "GradVac",
        }.items()
    },
    "fairgrad": ("-c", "balancers/torchjd", "--balancer.aggregator", "FairGrad", "--balancer.arguments", "{alpha: 1.0}"),
}
"""Options of `fit -c tiny` for each method; `marble` is the default of configs/tiny.yaml."""
COMPARED = tuple(METHODS)
"""The methods that run by default; the others are methods at MARBLE's cadence, and variants of `split`."""

METHODS |= {
    f"{name}_cadence_marble": (*METHODS[name], "-c", "balancers/cadence_marble", "--balancer.refresh_every", "5")
    for name in ("pcgrad", "cagrad", "mgda", "upgrad", "aligned_mtl", "nash_mtl", "imtl_g", "gradvac", "fairgrad")
}
"""5: the one of `marble` here, which has twice the paper's."""

METHODS["marble_every_1"] = ("--balancer.refresh_every", "1")
METHODS |= {
    f"{name}_kl_{weight}": (*METHODS[name], "--model.objective.kl_weight", weight)
    for name, weight in (("marble", "0.01"), ("marble", "0.1"), ("advantage_sum", "0.01"), ("advantage_sum", "0.1"))
}
"""A gain is to be seen beside the distance to the base, so MARBLE and the sum of advantages also run with other weights of
the KL term."""

METHODS["split_decay_0"] = (
    *("--balancer.gram", "split", "--balancer.ema_decay", "0", "--balancer.gram_decay", "0"),
    *("--balancer.gram_shrinkage", "false"),  # which needs an average
)
METHODS |= {f"split_{name}_{value}": (*SPLIT, f"--balancer.{option}", value) for name, option, value in ABLATIONS}

METHODS |= {f"{name}_std_round": (*options, "--model.objective.advantage_std", "round") for name, options in METHODS.items()}
"""Each method once more with advantages divided by the standard deviation of the whole round, as published."""

METHODS["marble_paper"] = ("-c", f"balancers/{REFERENCE}")
"""MARBLE as published: `marble_std_round` has another cadence, and weights that are smoothed at refreshes too."""


def run_of(stages: Stages, stage: str, method: str, seed: int, rounds: int, extra: Sequence[str]) -> Fit:
    """The run of a method on a stage.

    Args:
        stages: All stages.
        stage: Name of the one to train on.
        method: A key of `METHODS`.
        seed: Seed of the run.
        rounds: Its rounds.
        extra: Further arguments of `fit`.
    """
    configs = stages.training_on(stages.members[stage], stage)
    return Fit(f"{stage}_{method}_{rounds}", configs, (*METHODS[method], *options_of(rounds, extra)), seed)


def compare(stages: Stages, options: argparse.Namespace, extra: Sequence[str]) -> Results:
    """Figures of all runs by method and seed; those that have no result yet are run first."""
    rounds = options.rounds or stages.rounds
    keys = [(method, seed) for seed in options.seeds for method in options.methods]
    fits = [run_of(stages, options.stage, method, seed, rounds, extra) for method, seed in keys]
    results = fit_all(fits, Folders(options.folder, options.results), options.jobs)
    by_run = dict(zip(keys, results, strict=True))
    return {method: {seed: by_run[method, seed] for seed in options.seeds} for method in options.methods}


def find_specialists(stages: Stages, options: argparse.Namespace, extra: Sequence[str]) -> Specialists | str:
    """Changes by the specialists of the stage's rewards, or a sentence about those that have no result."""
    rounds, names = options.rounds or stages.rounds, stages.members[options.stage]
    folders, runs = Folders(options.folder, options.specialists), {}
    for name in names:
        fits = specialists(stages, [name], options.specialist_seeds, options_of(rounds, extra), rounds)
        runs[name] = load_all(fits, folders)
    if missing := [name for name, of_reward in runs.items() if not of_reward]:
        return (
            f"No normalised gains: they need a run on each reward alone with {rounds} rounds. Found none on "
            f"{', '.join(missing)} in {folders.results}; train them: python -m benchmarks.stage --stages {options.stage} "
            f"--rounds {rounds}"
        )
    return stack_specialists(runs)


def report(results: Results, stages: Stages, found: Specialists | str, options: argparse.Namespace) -> str:
    """All tables."""
    names = list(stages.members[options.stage])
    others = [name for name in [*stages.rewards, *stages.metrics] if name not in names]
    title = f"Held-out changes, {100 * options.level:g} % intervals over seeds and prompts:"
    parts = [title, changes_table(results, [*names, *others], options.level)]
    parts.append(cadences(results))
    if isinstance(found, str):
        parts.append(found)
    else:
        parts += ["Normalised gains, 1 is that of a run on this reward alone:", gains_table(results, names, found)]
        if options.against:
            parts.append(difference_table(results, options.against, names, found))
        if options.figure:
            write_gains_figure(results, names, found, options.figure)
            parts.append(f"Figure: {options.figure}")
    return "\n\n".join([*parts, "Cosines of the updates with each reward's gradient:", cosines_table(results, names)])


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of `fit`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", default="published", choices=STAGES)
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(METHODS), metavar="METHOD")
    add_run_options(parser, "methods", [0, 1, 2, 3, 4])
    add_specialist_options(parser)
    parser.add_argument("--against", choices=list(METHODS), metavar="METHOD", help="compare least gains with this method")
    parser.add_argument("--level", type=float, default=0.95, help="confidence of the intervals of the changes")
    parser.add_argument("--figure", type=Path, help="figure of the normalised gains, such as docs/conflict.png")
    options, extra = parser.parse_known_args()
    if not 0 < options.level < 1:
        parser.error(f"`--level` must be between 0 and 1, such as 0.95. Found {options.level}.")
    if options.against and options.against not in options.methods:
        parser.error(f"`--against` must be one of `--methods`. Found {options.against}; add it there.")
    return options, extra


def main() -> None:
    """Run the comparison and print the tables."""
    options, extra = parse()
    stages = read_stages()
    try:
        found = find_specialists(stages, options, extra)
        print(report(compare(stages, options, extra), stages, found, options))
    except ComparisonError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
