"""The mean of the LoRAs of a stage's specialists: `python -m benchmarks.averaged_specialists --stage conflict --seeds 0`.

A specialist is trained on each reward of a stage alone, as by `benchmarks.stage`. `marble-lightning export --average_with`
writes the mean of their updates: exactly, with the sum of their ranks, and the nearest update of a single one's rank. Both
are evaluated as the specialists were, so the base's scores are those that a specialist's run has. Specialists whose
checkpoints are in `--folder` are not trained again. Other options are passed to `fit` and `validate`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fits import ComparisonError, Fit, Folders, Result, call_marble, figures_of, fit_at_once, read, write
from benchmarks.method_tables import Results, changes_table, gains_table
from benchmarks.methods import find_specialists
from benchmarks.stages import STAGES, Stages, add_run_options, add_specialist_options, options_of, read_stages, specialists
from marble_lightning.lab.runs import Run

LAST = Path("checkpoints/last.ckpt")
AVERAGES = ("exact", "one rank")
"""The exact mean, and the nearest update of the rank of a single specialist."""


def averages(stages: Stages, options: argparse.Namespace, extra: Sequence[str]) -> Results:
    """Figures of both averages, by name and seed; those that have no result yet are computed first."""
    rounds, members = options.rounds or stages.rounds, stages.members[options.stage]
    folders, fit_options = Folders(options.folder, options.results), options_of(rounds, extra)
    found: dict[str, dict[int, Result]] = {name: {} for name in AVERAGES}
    for seed in options.seeds:
        alone = specialists(stages, members, [seed], fit_options, rounds)
        evaluations = {
            name: Fit(f"{options.stage}_{name.replace(' ', '_')}_{rounds}", stages.training_on(members), fit_options, seed)
            for name in AVERAGES
        }
        for name, evaluation in evaluations.items():
            result = read(folders.result(evaluation), evaluation.identity)
            found[name][seed] = result or evaluate(name, evaluation, trained(alone, folders.runs, options.jobs), folders)
    return found


def trained(fits: Sequence[Fit], folder: Path, jobs: int) -> list[Path]:
    """Folders of the specialists; those without a checkpoint are trained."""
    runs = Folders(folder, folder / "figures")
    fit_at_once([fit for fit in fits if not (runs.run(fit) / LAST).exists()], runs, jobs)
    return [runs.run(fit) for fit in fits]


def evaluate(name: str, evaluation: Fit, alone: Sequence[Path], folders: Folders) -> Result:
    """Average the specialists' adapters, score held-out prompts, and keep the figures."""
    start, place = time.monotonic(), folders.run(evaluation)
    shutil.rmtree(place, ignore_errors=True)
    first, *others = (str(folder / LAST) for folder in alone)
    policy = Run(alone[0]).config["model"]["policy"]["init_args"]
    rank, alpha, count = policy["rank"], policy["alpha"], len(alone)
    export = ["export", "--ckpt_path", first, "--average_with", json.dumps(others), "--to", str(place / "lora")]
    if name == "one rank":
        export += ["--rank", str(rank)]
    else:
        rank, alpha = rank * count, alpha * count
    call_marble(export, place / "export.txt", f"the average of {evaluation.name}")
    lora = {"init_lora": place / "lora", "rank": rank, "alpha": alpha}
    arguments = [*evaluation.arguments, "--seed_everything", str(evaluation.seed), "--trainer.logger.save_dir", str(place)]
    arguments += [part for key, value in lora.items() for part in (f"--model.policy.{key}", str(value))]
    arguments += ["--trainer.logger.name", "validate", "--trainer.logger.version", "0"]
    call_marble(["validate", *arguments], place / "output.txt", evaluation.name)
    figures = beside_base(Run(place / "validate/version_0"), Run(alone[0]))
    message = (place / "export.txt").read_text(encoding="utf-8").partition("\n")[0]
    figures |= {"balancer": f"mean of {count} LoRAs, rank {rank}. {message if name == 'one rank' else ''}".strip()}
    result = {
        **evaluation.identity,
        "seconds": round(time.monotonic() - start),
        "kl": None,
        "trained_rewards": [],
        **figures,
    }
    write(folders.result(evaluation), result)
    return result


def beside_base(run: Run, specialist: Run) -> Result:
    """Scores of an evaluated average, beside those of the base in a specialist's run with the same seed.

    Raises:
        ComparisonError: They have different prompts.
    """
    of_specialist, prompts = figures_of(specialist), run.results["prompts"]
    if [prompt["prompt"] for prompt in prompts] != [prompt["prompt"] for prompt in specialist.results["prompts"]]:
        raise ComparisonError(f"Both must have the same held-out prompts. Found others in {run.folder}.")
    names = of_specialist["rewards"]
    scores = [[prompt["scores"].get(name) for name in names] for prompt in prompts]
    return {"rewards": names, "base": of_specialist["base"], "trained": scores}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of `fit` and `validate`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", default="published", choices=STAGES)
    add_run_options(parser, "averaged", [0])
    add_specialist_options(parser)
    parser.set_defaults(folder=Path("runs/stage"))  # where `benchmarks.stage` has its specialists
    return parser.parse_known_args()


def main() -> None:
    """Print the tables."""
    options, extra = parse()
    stages = read_stages()
    names = list(stages.members[options.stage])
    others = [name for name in [*stages.rewards, *stages.metrics] if name not in names]
    try:
        found, results = find_specialists(stages, options, extra), averages(stages, options, extra)
    except ComparisonError as error:
        sys.exit(f"error: {error}")
    gains = found if isinstance(found, str) else gains_table(results, names, found)
    about = "\n".join(f"- {name}, seed {seed}: {run['balancer']}" for name in results for seed, run in results[name].items())
    print(changes_table(results, [*names, *others]), about, gains, sep="\n\n")


if __name__ == "__main__":
    main()
