"""The default run with several balancers and seeds: held-out scores before and after, and gradient harmony.

`python -m benchmarks.methods --seeds 0 1 2` runs each in a separate process. It prints two tables in Markdown and the
cadence of each method. A finished run is not repeated, so an interrupted comparison resumes. Other options are passed to
`fit`: with `--gradient_alignment.probe_every 4` harmony is also computed between refreshes, on fresh images, and for
baselines.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from balancers.gramian import in_conflict
from marble_lightning.lab.runs import Run, compare

METHODS = ("default", "fixed_weights", "weighted_sum")
"""`default` is configs/tiny.yaml, with MARBLE; the others are files of configs/balancers that override it. `+` joins several
files, as in `pcgrad+cadence_marble`."""


def fit(method: str, seed: int, folder: Path, extra: Sequence[str]) -> Path:
    """Fit once, unless the run is finished, and return the run's folder."""
    run_folder = folder / method / f"seed_{seed}"
    if not (run_folder / "results.json").exists():
        options = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", method]
        options += ["--trainer.logger.version", f"seed_{seed}", "--seed_everything", str(seed)]
        files = [] if method == "default" else [f"balancers/{name}" for name in method.split("+")]
        overlay = [part for file in files for part in ("-c", file)]
        command = [sys.executable, "-m", "marble_lightning", "fit", "-c", "tiny", *overlay, *options, *extra]
        shutil.rmtree(run_folder, ignore_errors=True)  # left by an interrupted comparison
        run_folder.mkdir(parents=True)
        with (run_folder / "output.txt").open("w") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    return run_folder


def main() -> None:
    """Run the comparison and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="default, or files of configs/balancers, joined by +")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options, extra = parser.parse_known_args()

    pairs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda pair: fit(pair[0], pair[1], options.folder, extra), pairs))
    runs = {pair: Run(folder) for pair, folder in zip(pairs, folders, strict=True)}
    print(scores_table(runs))
    print()
    print(cadences(runs))
    print()
    print(harmony_table(runs))


def cadences(runs: dict[tuple[str, int], Run]) -> str:
    """The balancer and cadence of each method, one line for each distinct cadence of its runs."""
    lines = {f"- {method}: {run.balancer}": None for method, seeds in by_method(runs).items() for run in seeds.values()}
    return "\n".join(lines)


def scores_table(runs: dict[tuple[str, int], Run]) -> str:
    """Held-out scores (change ± its standard error) of each method: first averaged over seeds, then for each seed."""
    reward_models = next(iter(runs.values())).reward_models
    lines = ["| method | " + " | ".join(reward_models) + " |", "|---" * (len(reward_models) + 1) + "|"]
    all_runs = compare(list(runs.values()))
    lines.append("| base | " + " | ".join(f"{all_runs[name].base.mean:.3f}" for name in reward_models) + " |")
    for method, seeds in by_method(runs).items():
        scores = compare(list(seeds.values())).values()
        cells = [f"{score.trained.mean:.3f} ({score.change.mean:+.3f} ± {score.change.error:.3f})" for score in scores]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
        for seed, run in seeds.items():
            cells = [f"{score.change.mean:+.3f} ± {score.change.error:.3f}" for score in compare([run]).values()]
            lines.append(f"| {method}, seed {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_method(runs: dict[tuple[str, int], Run]) -> dict[str, dict[int, Run]]:
    """The runs of each method by seed."""
    return {method: {seed: run for (name, seed), run in runs.items() if name == method} for method, _ in runs}


PLACES = {
    "harmony": "refresh, the gradients it was solved on",
    "probe/solved/own": "refresh, as applied",
    "probe/solved/fresh": "refresh, fresh images",
    "probe/reused/own": "between refreshes, own images",
    "probe/reused/fresh": "between refreshes, fresh images",
}
"""Title of each prefix under which cosines are logged; probes only with `--gradient_alignment.probe_every`."""


BASELINES = {
    "weighted_sum": "weighted reward sum, the paper's baseline",
    "mean": "mean of the rewards' gradients",
    "unit_mean": "mean of their unit gradients",
    "random": "random direction",
}
"""Title of each baseline that is logged with an update, on the images that the update was computed from."""


def harmony_table(runs: dict[tuple[str, int], Run]) -> str:
    """Cosines between a direction and each reward's gradient, averaged over the logged values of all seeds.

    The row `by chance` has the conflict rate of a random direction.
    """
    lines = ["| direction | where | n | worst cosine | mean cosine | variance | conflict rate |", "|---" * 7 + "|"]
    for method, seeds in by_method(runs).items():
        titles = {"update": method, **{kind: f"{title}, during {method}" for kind, title in BASELINES.items()}}
        for tag, where in PLACES.items():
            for kind, title in titles.items():
                worst, mean, variance = (logged(seeds, f"{tag}/{kind}/cos_{name}") for name in ("min", "mean", "var"))
                if worst:
                    cells = " | ".join(f"{fmean(values):+.3f}" for values in (worst, mean, variance))
                    conflicts = fmean(in_conflict(value) for value in worst)
                    lines.append(f"| {title} | {where} | {len(worst)} | {cells} | {conflicts:.0%} |")
            if chance := logged(seeds, f"{tag}/chance"):
                lines.append(f"| by chance, during {method} | {where} | {len(chance)} | | | | {fmean(chance):.0%} |")
    return "\n".join(lines)


def logged(runs: dict[int, Run], name: str) -> list[float]:
    """All values that the runs logged under a name."""
    return [value for run in runs.values() for value in run.curve(name).values]


if __name__ == "__main__":
    main()
