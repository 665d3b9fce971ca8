"""The paper's ablations on a stage, beside the published ones: `python -m benchmarks.ablations --seeds 0 1 --jobs 2`.

Every variant changes one setting of `balancers/marble_paper`, but for two: `gram_plain` and `gram_split` average inner
products over refreshes, and differ from each other in one. Prints the held-out change of each reward, the normalised gains,
the difference of the least gains to those of `marble_paper`, and the difference of each reward beside the paper's.
Runs and results are kept as by `benchmarks.methods`; `notebooks/03_ablations.ipynb` explains and fits the same variants.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.fingerprint import resolve
from benchmarks.fits import ComparisonError, Fit, Folders, changes_of, fit_all
from benchmarks.method_tables import Results, changes_table, difference_table, gains_table
from benchmarks.methods import find_specialists
from benchmarks.stage_tables import table
from benchmarks.stages import STAGES, Stages, add_run_options, add_specialist_options, options_of, read_stages
from marble_lightning.lab.ablations import differences_beside_paper, variants
from marble_lightning.lab.paper import REFERENCE


def settings_of(rounds: int) -> dict[str, dict[str, object]]:
    """Settings of the reference and of every variant, by name, for runs of `-c tiny` with these rounds."""
    groups = variants(rounds * resolve("-c", "tiny")["model"]["optimizer_steps_per_round"]).values()
    return {REFERENCE: {}} | {name: settings for group in groups for name, settings in group.items()}


def run_of(stages: Stages, stage: str, variant: str, seed: int, rounds: int) -> Fit:
    """The run of a variant on a stage.

    Args:
        stages: All stages.
        stage: Name of the one to train on.
        variant: A key of `settings_of`.
        seed: Seed of the run.
        rounds: Its rounds.
    """
    changed = settings_of(rounds)[variant]
    settings = ("-c", json.dumps(changed)) if changed else ()
    options = ("-c", f"balancers/{REFERENCE}", *settings, *options_of(rounds, ()))
    return Fit(f"{stage}_{variant}_{rounds}", stages.training_on(stages.members[stage], stage), options, seed)


def paper_table(results: Results, names: Sequence[str]) -> str:
    """The difference of each variant to the reference beside the paper's.

    Args:
        results: Figures of runs by variant and seed, among them the reference's.
        names: The rewards of the stage.
    """
    reference = changes_of(list(results[REFERENCE].values()), names)
    others = {variant: runs for variant, runs in results.items() if variant != REFERENCE}
    differences = {variant: changes_of(list(runs.values()), names) - reference for variant, runs in others.items()}
    found = differences_beside_paper(differences, names)
    return table(list(found.columns), found.values.tolist())


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", default="published", choices=STAGES)
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help=f"besides {REFERENCE}; default: all")
    add_run_options(parser, "ablations", [0, 1])
    add_specialist_options(parser)
    options = parser.parse_args()
    stages = read_stages()
    rounds, names = options.rounds or stages.rounds, stages.members[options.stage]
    known = list(settings_of(rounds))
    if unknown := [name for name in options.variants or [] if name not in known]:
        parser.error(f"`--variants` must be some of {', '.join(known)}. Found {', '.join(unknown)}.")
    shown = list(dict.fromkeys([REFERENCE, *(options.variants or known)]))
    keys = [(variant, seed) for seed in options.seeds for variant in shown]
    fits = [run_of(stages, options.stage, variant, seed, rounds) for variant, seed in keys]
    try:
        runs = fit_all(fits, Folders(options.folder, options.results), options.jobs)
        by_run = dict(zip(keys, runs, strict=True))
        results = {variant: {seed: by_run[variant, seed] for seed in options.seeds} for variant in shown}
        found = find_specialists(stages, options, [])
        print(changes_table(results, [*names, *stages.metrics]), end="\n\n")
        if isinstance(found, str):
            print(found, end="\n\n")
        else:
            print(gains_table(results, names, found), end="\n\n")
            print(difference_table(results, REFERENCE, names, found), end="\n\n")
        print(paper_table(results, names))
    except ComparisonError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
