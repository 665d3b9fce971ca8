"""The default run with several balancers and seeds: held-out scores before and after, and harmony.

`python -m benchmarks.methods --seeds 0 1 2` runs each in a process of its own and prints two tables in Markdown, and the
cadence of each method. A finished run is not repeated, so an interrupted comparison resumes. Other options go
to `fit`: with `--harmony.probe_every 4` harmony is measured between refreshes and on fresh images too, and beside baselines.
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
"""`default` is configs/tiny.yaml as it stands, with MARBLE; the others are files of configs/balancers laid over it, several
of them joined by `+`, as in `pcgrad+cadence_marble`."""


def fit(method: str, seed: int, folder: Path, extra: Sequence[str]) -> Path:
    """Fit once; returns the run's folder."""
    place = folder / method / f"seed_{seed}"
    if not (place / "results.json").exists():
        options = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", method]
        options += ["--trainer.logger.version", f"seed_{seed}", "--seed_everything", str(seed)]
        files = [] if method == "default" else [f"balancers/{name}" for name in method.split("+")]
        overlay = [part for file in files for part in ("-c", file)]
        command = [sys.executable, "-m", "marble_lightning", "fit", "-c", "tiny", *overlay, *options, *extra]
        shutil.rmtree(place, ignore_errors=True)  # what an interrupted comparison left
        place.mkdir(parents=True)
        with (place / "output.txt").open("w") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    return place


def main() -> None:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="default, or files of configs/balancers, joined by +")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options, extra = parser.parse_known_args()

    wanted = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        places = list(pool.map(lambda pair: fit(pair[0], pair[1], options.folder, extra), wanted))
    runs = {pair: Run(place) for pair, place in zip(wanted, places, strict=True)}
    print(scores_table(runs))
    print()
    print(cadences(runs))
    print()
    print(harmony_table(runs))


def cadences(runs: dict[tuple[str, int], Run]) -> str:
    """What each method ran as, a line for every cadence that is among its runs."""
    found = {f"- {method}: {run.balancer}": None for method, own in by_method(runs).items() for run in own.values()}
    return "\n".join(found)


def scores_table(runs: dict[tuple[str, int], Run]) -> str:
    """Held-out scores (change ± its standard error) of each method, prompts' means over seeds first, then seed by seed."""
    reward_models = next(iter(runs.values())).reward_models
    lines = ["| method | " + " | ".join(reward_models) + " |", "|---" * (len(reward_models) + 1) + "|"]
    whole = compare(list(runs.values()))
    lines.append("| base | " + " | ".join(f"{whole[name].base.mean:.3f}" for name in reward_models) + " |")
    for method, own in by_method(runs).items():
        found = compare(list(own.values())).values()
        cells = [f"{each.trained.mean:.3f} ({each.change.mean:+.3f} ± {each.change.error:.3f})" for each in found]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
        for seed, run in own.items():
            cells = [f"{each.change.mean:+.3f} ± {each.change.error:.3f}" for each in compare([run]).values()]
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
"""Where cosines are logged, and what that means; probes only with `--harmony.probe_every`."""


BASELINES = {
    "weighted_sum": "weighted reward sum, the paper's baseline",
    "mean": "mean of the rewards' gradients",
    "unit_mean": "mean of their unit gradients",
    "random": "random direction",
}
"""What stands beside an update where it is logged, on the images that the update came from."""


def harmony_table(runs: dict[tuple[str, int], Run]) -> str:
    """Cosines between a direction and each reward's gradient, averaged over what all seeds logged.

    The row `by chance` has the conflict rate of a direction that knows nothing of the gradients.
    """
    lines = ["| direction | where | n | worst cosine | mean cosine | variance | conflict rate |", "|---" * 7 + "|"]
    for method, own in by_method(runs).items():
        titles = {"update": method, **{kind: f"{title}, during {method}" for kind, title in BASELINES.items()}}
        for tag, where in PLACES.items():
            for kind, title in titles.items():
                worst, mean, variance = (logged(own, f"{tag}/{kind}/cos_{what}") for what in ("min", "mean", "var"))
                if worst:
                    figures = " | ".join(f"{fmean(values):+.3f}" for values in (worst, mean, variance))
                    conflicts = fmean(in_conflict(value) for value in worst)
                    lines.append(f"| {title} | {where} | {len(worst)} | {figures} | {conflicts:.0%} |")
            if chance := logged(own, f"{tag}/chance"):
                lines.append(f"| by chance, during {method} | {where} | {len(chance)} | | | | {fmean(chance):.0%} |")
    return "\n".join(lines)


def logged(runs: dict[int, Run], name: str) -> list[float]:
    """All that runs logged under a name."""
    return [value for run in runs.values() for value in run.curve(name).values]


if __name__ == "__main__":
    main()
