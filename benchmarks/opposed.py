"""Methods that merge rewards where one reward opposes the others: `python -m benchmarks.opposed --seeds 0 1 2 --jobs 2`.

The five rewards of configs/tiny.yaml ask for clean images. A sixth, the mean absolute difference of neighbouring pixels,
asks for noise; `--aligned` leaves it out. The first table has the held-out change of each reward; with several seeds its
95 % interval by a crossed bootstrap over seeds and prompts, with one its standard error over prompts. The second table has
the mean cosine of the update with each reward's gradient, on the update's own images and by products of halves. Runs have
44 rounds, and each has one thread. A finished run is not repeated: its figures are kept in `--results`, one small JSON file
each, so an interrupted comparison resumes and the tables can be printed again without the runs. Other options are passed to
`fit`.
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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marble_lightning.evaluation.statistics import crossed_interval, summarise
from marble_lightning.lab.runs import Run
from rewards import Reward

PUBLISHED_SPREADS = {"pickscore": 0.18, "hpsv2": 0.11, "clipscore": 0.6}
"""Weights that give the bundled rewards about the spread within a prompt of the published models; 1 for the others.

Spreads of the published models are estimates, over those of the bundled ones: 0.03 / 0.165, 0.02 / 0.18, 0.025 / 0.04.
"""

PROBES = ["--gradient_alignment.probe_every", "5", "--gradient_alignment.fresh", "false"]
"""For methods without refreshes: the same figures of alignment, on the images that the update comes from."""
AVERAGED = ["--balancer.gram_decay", "0.9", "--balancer.ema_decay", "0"]
SPLIT = ["--balancer.gram", "split", *AVERAGED]
"""The Gram matrix is averaged over refreshes instead of its solutions."""

ABLATIONS = [
    *(("decay", "gram_decay", value) for value in ("0.7", "0.97")),
    *(("floor", "signal_floor", value) for value in ("0.05", "0.5")),
    *(("every", "refresh_every", value) for value in ("2", "10")),
    ("shrinkage", "gram_shrinkage", "false"),
]
"""Name, option and value of each; `split` has 0.9, 0.15, 5 and true."""

METHODS: dict[str, list[str]] = {
    "weighted_sum": ["-c", "balancers/weighted_sum", "--balancer.weights", json.dumps(PUBLISHED_SPREADS), *PROBES],
    "advantage_sum": ["-c", "balancers/advantage_sum", *PROBES],
    "fixed_weights": ["-c", "balancers/fixed_weights", *PROBES],
    "fixed_weights_normalised": ["-c", "balancers/fixed_weights_normalized"],
    "marble_raw_5": [],
    "marble_raw_10": ["--balancer.refresh_every", "10"],
    "marble_floor": ["--balancer.floor", "0.05"],
    "averaged": AVERAGED,
    "split": SPLIT,
}
"""Options of `fit -c tiny` for each method; tiny.yaml has MARBLE with a refresh every 5 steps."""

METHODS["split_decay_0"] = ["--balancer.gram", "split", "--balancer.ema_decay", "0", "--balancer.gram_shrinkage", "false"]
METHODS |= {f"split_{name}_{value}": [*SPLIT, f"--balancer.{option}", value] for name, option, value in ABLATIONS}


class Texture(Reward):
    """The mean absolute difference of neighbouring pixels; it opposes rewards that ask for clean images."""

    def score(self, *, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        across, down = images.diff(dim=3).abs().mean((1, 2, 3)), images.diff(dim=2).abs().mean((1, 2, 3))
        return (across + down) / 2


@dataclass(frozen=True)
class Experiment:
    """What all runs of a comparison share."""

    rounds: int
    aligned: bool
    """Whether the opposing reward is left out."""
    folder: Path
    results: Path
    extra: Sequence[str]
    """Further options of `fit`."""

    def fit(self, method: str, seed: int) -> dict[str, Any]:
        """Fit once, unless the result is there, and return its figures."""
        name = f"{'aligned_' if self.aligned else ''}{method}_{self.rounds}_seed_{seed}"
        file, run = self.results / f"{name}.json", self.folder / name / "run"
        if not file.exists():
            shutil.rmtree(run, ignore_errors=True)  # left by an interrupted comparison
            run.mkdir(parents=True)
            options = ["--trainer.logger.save_dir", str(self.folder), "--trainer.logger.name", name]
            options += ["--trainer.logger.version", "run", "--seed_everything", str(seed)]
            options += ["--trainer.max_epochs", str(self.rounds), "--trainer.check_val_every_n_epoch", str(self.rounds)]
            options += [] if self.aligned else ["--model.rewards.texture", "benchmarks.opposed.Texture"]
            command = [
                sys.executable,
                "-m",
                "marble_lightning",
                "fit",
                "-c",
                "tiny",
                *METHODS[method],
                *options,
                *self.extra,
            ]
            with (run / "output.txt").open("w") as output:
                one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=one_thread)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"options": list(self.extra)} | figures_of(Run(run))))
        found: dict[str, Any] = json.loads(file.read_text())
        if (options := found.get("options", [])) != list(self.extra):
            raise ValueError(
                f"{file} must be a result with the same options of `fit`. Found {options}; use other `--results`."
            )
        return found


def figures_of(run: Run) -> dict[str, Any]:
    """A run's held-out scores (prompt, reward), and the cosines (refresh, reward) of its updates with each reward.

    The cosines are those of the weights that most steps use: the reused ones, if not all steps solve.

    Scores have four digits, cosines three. They are null where a reward does not apply or has no estimate.
    """
    names, prompts = run.reward_models, run.results["prompts"]

    def rows(key: str) -> list[list[float | None]]:
        values = ([prompt[key].get(name) for name in names] for prompt in prompts)
        return [[None if value is None else round(value, 4) for value in row] for row in values]

    trained = [name for name in names if run.curve(f"cosine/update/own/{name}").values]
    kind = "reused" if run.evaluated.get("refresh_every", 1) > 1 else "update"
    cosines = {}
    for place in ("own", "split"):
        curves = [dict(zip(*run.curve(f"cosine/{kind}/{place}/{name}"), strict=True)) for name in trained]
        steps = sorted({step for curve in curves for step in curve})
        cosines[place] = [[round(curve[step], 3) if step in curve else None for curve in curves] for step in steps]
    noise = {name: round(run.curve(f"signal_to_noise/{name}").values[-1], 3) for name in trained}
    scores = {"rewards": names, "base": rows("base"), "trained": rows("scores")}
    return scores | {"balancer": run.balancer, "trained_rewards": trained, "cosines": cosines, "signal_to_noise": noise}


def scores_table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Held-out change of each reward by method: the mean, and its interval, or for a single seed its standard error."""
    names = next(iter(found.values()))["rewards"]
    lines = ["| method | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method in dict.fromkeys(method for method, _ in found):
        runs = [result for (name, _), result in found.items() if name == method]
        changes = torch.stack([as_tensor(run["trained"]) - as_tensor(run["base"]) for run in runs])
        lines.append(f"| {method} | {len(runs)} | " + " | ".join(map(cell, changes.unbind(2))) + " |")
    return "\n".join(lines)


def cosines_table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Mean cosine of a method's updates with each reward's gradient ± standard error over refreshes and seeds.

    The last column is how often the least cosine of a refresh is negative.
    """
    found = {pair: run for pair, run in found.items() if "cosines" in run}  # not in results of earlier versions
    if not found:
        return ""
    names = next(iter(found.values()))["trained_rewards"]
    lines = ["| method | products | refreshes | " + " | ".join(names) + " | conflicts |", "|---" * (len(names) + 4) + "|"]
    for method, place in product(dict.fromkeys(method for method, _ in found), ("own", "split")):
        runs = [run["cosines"] for (name, _), run in found.items() if name == method]
        rows = as_tensor([row for run in runs for row in run[place]])
        if not len(rows):
            continue
        means = [summarise(column) for column in rows.unbind(1)]
        cells = [f"{found.mean:+.3f} ± {found.error:.3f}" for found in means]
        conflicts = (rows[rows.isfinite().all(1)].amin(1) < 0).double().mean()
        lines.append(f"| {method} | {place} | {len(rows)} | " + " | ".join(cells) + f" | {conflicts:.0%} |")
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
    parser.add_argument("--aligned", action="store_true", help="without the opposing reward")
    options, extra = parser.parse_known_args()
    experiment = Experiment(options.rounds, options.aligned, options.folder, options.results, extra)
    pairs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(pairs, tqdm(pool.map(lambda pair: experiment.fit(*pair), pairs), "runs", len(pairs)), strict=True))
    print(scores_table(found))
    print()
    print(cosines_table(found))


if __name__ == "__main__":
    main()
