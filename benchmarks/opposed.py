"""Methods that merge rewards where one reward opposes the others: `python -m benchmarks.opposed --seeds 0 1 2 --jobs 2`.

The five rewards of configs/tiny.yaml ask for clean images. A sixth, the mean absolute difference of neighbouring pixels,
asks for noise. The table has the held-out change of each reward; with several seeds its 95 % interval by a crossed
bootstrap over seeds and prompts, with one its standard error over prompts. Runs have 44 rounds, and each has one thread. A
finished run is not repeated: its scores are kept in `--results`, one small JSON file each, so an interrupted comparison
resumes and the table can be printed again without the runs. Other options are passed to `fit`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marble_lightning.evaluation.results import read
from marble_lightning.evaluation.statistics import crossed_interval, summarise
from rewards import Reward

PUBLISHED_SPREADS = {"pickscore": 0.18, "hpsv2": 0.11, "clipscore": 0.6}
"""Weights that give the bundled rewards about the spread within a prompt of the published models; 1 for the others.

Spreads of the published models are estimates, over those of the bundled ones: 0.03 / 0.165, 0.02 / 0.18, 0.025 / 0.04.
"""

METHODS: dict[str, list[str]] = {
    "weighted_sum": ["-c", "balancers/weighted_sum", "--balancer.weights", json.dumps(PUBLISHED_SPREADS)],
    "advantage_sum": ["-c", "balancers/advantage_sum"],
    "fixed_weights": ["-c", "balancers/fixed_weights"],
    "fixed_weights_normalised": ["-c", "balancers/fixed_weights", "--balancer.normalize", "true"],
    "marble_raw_5": ["--balancer.refresh_every", "5", "--balancer.amortize", "raw"],
    "marble_raw_10": ["--balancer.refresh_every", "10", "--balancer.amortize", "raw"],
    "marble_scaled": ["--balancer.refresh_every", "5", "--balancer.amortize", "scaled"],
    "marble_floor": ["--balancer.refresh_every", "5", "--balancer.amortize", "raw", "--balancer.floor", "0.05"],
}
"""Options of `fit -c tiny` for each method."""


class Texture(Reward):
    """The mean absolute difference of neighbouring pixels; it opposes rewards that ask for clean images."""

    def score(self, *, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        across, down = images.diff(dim=3).abs().mean((1, 2, 3)), images.diff(dim=2).abs().mean((1, 2, 3))
        return (across + down) / 2


def fit(method: str, seed: int, folder: Path, results: Path, rounds: int, extra: Sequence[str]) -> dict[str, Any]:
    """Fit once, unless the result is there, and return the scores of all held-out prompts before and after."""
    name = f"{method}_{rounds}_seed_{seed}"
    file = results / f"{name}.json"
    if not file.exists():
        shutil.rmtree(folder / name, ignore_errors=True)  # left by an interrupted comparison
        (folder / name).mkdir(parents=True)
        options = [
            "--trainer.logger.save_dir",
            str(folder),
            "--trainer.logger.name",
            name,
            "--trainer.logger.version",
            "run",
        ]
        options += ["--trainer.max_epochs", str(rounds), "--trainer.check_val_every_n_epoch", str(rounds)]
        options += ["--seed_everything", str(seed), "--model.rewards.texture", "benchmarks.opposed.Texture"]
        command = [sys.executable, "-m", "marble_lightning", "fit", "-c", "tiny", *METHODS[method], *options, *extra]
        with (folder / name / "output.txt").open("w") as output:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=one_thread)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(scores_of(folder / name / "run")))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def scores_of(run: Path) -> dict[str, Any]:
    """Scores (prompt, reward) of a run's held-out prompts, to four digits; null where a reward does not apply."""
    content = read(run)
    names = list(content["rewards"])

    def rows(key: str) -> list[list[float | None]]:
        values = ([prompt[key].get(name) for name in names] for prompt in content["prompts"])
        return [[None if value is None else round(value, 4) for value in row] for row in values]

    return {"rewards": names, "base": rows("base"), "trained": rows("scores")}


def scores_table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Held-out change of each reward by method: the mean, and its interval, or for a single seed its standard error."""
    names = next(iter(found.values()))["rewards"]
    lines = ["| method | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method in dict.fromkeys(method for method, _ in found):
        runs = [result for (name, _), result in found.items() if name == method]
        changes = torch.stack([as_tensor(run["trained"]) - as_tensor(run["base"]) for run in runs])
        lines.append(f"| {method} | {len(runs)} | " + " | ".join(map(cell, changes.unbind(2))) + " |")
    return "\n".join(lines)


def cell(changes: Tensor) -> str:
    """The mean of changes (seed, prompt) with its interval, or for a single seed with its standard error."""
    if len(changes) == 1:
        found = summarise(changes[0])
        return f"{found.mean:+.3f} ± {found.error:.3f}"
    interval = crossed_interval(changes)
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def as_tensor(rows: list[list[float | None]]) -> Tensor:
    """Rows of scores as a matrix, NaN where there is none."""
    return torch.tensor([[torch.nan if value is None else value for value in row] for row in rows])


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=44)
    parser.add_argument("--folder", type=Path, default=Path("runs/opposed"), help="of the runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/opposed"), help="of their scores")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options, extra = parser.parse_known_args()

    def run(pair: tuple[str, int]) -> dict[str, Any]:
        return fit(*pair, options.folder, options.results, options.rounds, extra)

    pairs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(tqdm(pool.map(run, pairs), "runs", len(pairs)))
    print(scores_table(dict(zip(pairs, found, strict=True))))


if __name__ == "__main__":
    main()
