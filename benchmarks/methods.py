"""The default run with several balancers and seeds: held-out scores before and after, and harmony.

`python -m benchmarks.methods --seeds 0 1 2` runs each in a process of its own and prints two tables in Markdown. A finished
run is not repeated, so an interrupted comparison goes on with the rest.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from marble_lightning.table import changes, summarise

METHODS = ("default", "fixed_weights", "weighted_sum")
"""`default` is configs/tiny.yaml as it stands, with MARBLE; the others are files of configs/balancers laid over it."""


def run(method: str, seed: int, folder: Path, extra: Sequence[str]) -> Path:
    """Fit once; returns the run's folder."""
    place = folder / method / f"seed_{seed}"
    if not (place / "held_out.pt").exists():
        options = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", method]
        options += ["--trainer.logger.version", f"seed_{seed}", "--seed_everything", str(seed)]
        overlay = [] if method == "default" else ["-c", f"configs/balancers/{method}.yaml"]
        command = [sys.executable, "-m", "marble_lightning", "fit", "-c", "configs/tiny.yaml", *overlay, *options, *extra]
        shutil.rmtree(place, ignore_errors=True)  # what an interrupted comparison left
        place.mkdir(parents=True)
        with (place / "output.txt").open("w") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    return place


def scalars(place: Path, name: str) -> list[float]:
    """All values of one TensorBoard curve."""
    events = EventAccumulator(str(place)).Reload()
    return [event.value for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def main() -> None:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="default, or names of files in configs/balancers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options, extra = parser.parse_known_args()

    wanted = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        places = dict(zip(wanted, pool.map(lambda pair: run(pair[0], pair[1], options.folder, extra), wanted), strict=True))

    print(scores_table(places))
    print()
    print(harmony_table(places))


def scores_table(places: dict[tuple[str, int], Path]) -> str:
    """Held-out scores (change ± its standard error) of each method, prompts' means over seeds first, then seed by seed."""
    lines: list[str] = []
    for method in dict.fromkeys(method for method, _ in places):
        kept = [
            torch.load(place / "held_out.pt", weights_only=True) for (name, _), place in places.items() if name == method
        ]
        if not lines:
            lines += ["| method | " + " | ".join(kept[0]["judges"]) + " |", "|---" * (len(kept[0]["judges"]) + 1) + "|"]
            base = torch.stack([each["base"] for each in kept]).mean(0)
            lines.append("| base | " + " | ".join(f"{summarise(column).mean:.3f}" for column in base.T) + " |")
        means = torch.stack([each["trained"].nanmean(0) for each in kept]).mean(0)
        together = changes(*(torch.stack([each[when] for each in kept]).mean(0) for when in ("base", "trained")))
        cells = [
            f"{mean:.3f} ({change.mean:+.3f} ± {change.error:.3f})" for mean, change in zip(means, together, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
        for (name, seed), each in zip([pair for pair in places if pair[0] == method], kept, strict=True):
            cells = [f"{change.mean:+.3f} ± {change.error:.3f}" for change in changes(each["base"], each["trained"])]
            lines.append(f"| {name}, seed {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def harmony_table(places: dict[tuple[str, int], Path]) -> str:
    """Cosines between an update and each reward's gradient, averaged over the refreshes of all seeds."""
    lines = ["| update | refreshes | worst cosine | mean cosine | variance | conflict rate |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(method for method, _ in places):
        folders = [place for (name, _), place in places.items() if name == method]
        for kind, title in (("update", method), ("mean", f"plain mean of {method}'s gradients")):
            found = {
                what: [value for place in folders for value in scalars(place, f"harmony/{kind}/cos_{what}")]
                for what in ("min", "mean", "var")
            }
            if found["min"]:
                figures = " | ".join(f"{sum(values) / len(values):+.3f}" for values in found.values())
                conflicts = sum(value < -1e-6 for value in found["min"]) / len(found["min"])
                lines.append(f"| {title} | {len(found['min'])} | {figures} | {conflicts:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
