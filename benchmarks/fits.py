"""Runs of `fit` for comparisons: each in a process of its own with one thread, and each only once.

The figures of a finished run are kept in a small JSON file, so an interrupted comparison resumes, and its tables can be
printed again without the runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.fingerprint import fingerprint
from marble_lightning.lab.report.harmony import PLACES, chance_of, weights_of
from marble_lightning.lab.runs import Run

Result = dict[str, Any]
"""The figures of a run, from `figures_of`, with its `options`, `fingerprint` and `seconds`."""


class ComparisonError(Exception):
    """A comparison cannot be completed: a run failed, or a result is that of another run."""


@dataclass(frozen=True)
class Fit:
    """A run of `fit`.

    Args:
        name: Its name without the seed.
        configs: Arguments of `fit` that all runs of a comparison share.
        options: Further arguments, recorded in the result.
        seed: Seed of the run.
        environment: Environment variables of its process, and their values.
    """

    name: str
    configs: tuple[str, ...]
    options: tuple[str, ...]
    seed: int
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def arguments(self) -> list[str]:
        """All arguments of `fit` but the folder and the seed."""
        return [*self.configs, *self.options]

    @property
    def identity(self) -> Result:
        """The part of its result that says what was run."""
        environment = {"environment": dict(self.environment)} if self.environment else {}
        return {"options": list(self.options), "fingerprint": fingerprint(self.arguments), **environment}


@dataclass(frozen=True)
class Folders:
    """Where runs and results are.

    Args:
        runs: Folder of the runs.
        results: Folder of their figures.
    """

    runs: Path
    results: Path

    def result(self, fit: Fit) -> Path:
        """File of a run's figures."""
        return self.results / f"{fit.name}_seed_{fit.seed}.json"

    def run(self, fit: Fit) -> Path:
        """A run's folder."""
        return self.runs / f"{fit.name}_seed_{fit.seed}" / "run"


def read(file: Path, identity: Result) -> Result | None:
    """The figures in a file, or None if there is no file.

    Args:
        file: A result.
        identity: `options`, `fingerprint` and, where the run had one, `environment` that it must have.

    Raises:
        ComparisonError: The figures are those of other options, of another configuration or of other weights.
    """
    if not file.exists():
        return None
    result: Result = json.loads(file.read_text(encoding="utf-8"))
    kept, expected = result.get("fingerprint", {}), identity["fingerprint"]
    differences = [f"another {name}" for name in expected if kept.get(name) != expected[name]]
    if result.get("environment") != identity.get("environment"):
        differences.insert(0, f"the environment {result.get('environment')} instead of {identity.get('environment')}")
    if result.get("options") != identity["options"]:
        differences.insert(0, f"the options {result.get('options')} instead of {identity['options']}")
    if differences:
        raise ComparisonError(
            f"{file} must have the figures of this comparison's run. Found those of a run with {', '.join(differences)}; "
            "delete the file, or use other `--results`."
        )
    return result


def write(file: Path, result: Result) -> None:
    """Write figures in one step, so that an interrupted comparison leaves no half of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(result), encoding="utf-8")
    scratch.replace(file)


def fit_all(fits: Sequence[Fit], folders: Folders, jobs: int) -> list[Result]:
    """Run all that have no result yet, and return the figures of all, in their order.

    Args:
        fits: The runs.
        folders: Where runs and results are.
        jobs: Runs at a time, >= 1.

    Raises:
        ComparisonError: A result is that of another run; or a run failed, then those that have started are finished first.
    """
    missing = [fit for fit in fits if read(folders.result(fit), fit.identity) is None]
    if missing:
        print(f"{len(missing)} of {len(fits)} runs have no result in {folders.results}: training them.", file=sys.stderr)
    fit_at_once(missing, folders, jobs)
    return load_all(fits, folders)


def fit_at_once(fits: Sequence[Fit], folders: Folders, jobs: int) -> None:
    """Run all, some at a time.

    Raises:
        ComparisonError: A run failed; those that have started are finished first.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        list(tqdm(pool.map(lambda fit: fit_once(fit, folders), fits), "runs", len(fits), disable=not fits))
    finally:
        pool.shutdown(cancel_futures=True)


def load_all(fits: Iterable[Fit], folders: Folders) -> list[Result]:
    """The figures of those runs that have a result.

    Raises:
        ComparisonError: A result is that of another run.
    """
    results = (read(folders.result(fit), fit.identity) for fit in fits)
    return [result for result in results if result is not None]


def fit_once(fit: Fit, folders: Folders) -> None:
    """Run `fit` in a process with one thread, and write its figures."""
    run = folders.run(fit)
    shutil.rmtree(run, ignore_errors=True)  # left by an interrupted comparison
    run.mkdir(parents=True)
    folder = ["--trainer.logger.save_dir", str(folders.runs), "--trainer.logger.name", run.parent.name]
    folder += ["--trainer.logger.version", run.name, "--seed_everything", str(fit.seed)]
    identity, start = fit.identity, time.monotonic()
    call_marble(["fit", *fit.arguments, *folder], run / "output.txt", fit.name, dict(fit.environment))
    seconds = round(time.monotonic() - start)
    write(folders.result(fit), {**identity, "seconds": seconds, **figures_of(Run(run))})


def call_marble(arguments: Sequence[str], output: Path, title: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command of `marble-lightning` in a process with one thread, unless `environment` says otherwise.

    Args:
        arguments: The command and its arguments.
        output: File of its messages.
        title: Its name, for the error message.
        environment: Environment variables to set.

    Raises:
        ComparisonError: It failed.
    """
    command = [sys.executable, "-m", "marble_lightning", *arguments]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as messages:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        ended = subprocess.run(command, check=False, stdout=messages, stderr=subprocess.STDOUT, env=variables)
    if ended.returncode:
        last = next((line for line in reversed(output.read_text().splitlines()) if line.strip()), "nothing")
        raise ComparisonError(
            f"Every run of a comparison must finish. Found exit status {ended.returncode} of {title}, and as its last "
            f"message: {last.strip()} All messages are in {output}."
        )


def figures_of(run: Run) -> Result:
    """A run's held-out scores (prompt, reward), and the cosines (refresh, reward) of its updates with each reward.

    `cosines` are those of the weights that most steps use: the reused ones, if not all steps solve. `solved` are then those
    of the weights that a refresh has just found, as in the paper. Cosines by products of halves are of reused weights
    wherever there are any: weights found on the same images follow their noise. `chance` is the share of conflicts of a
    direction without any signal, `signal_to_noise` the last ratio of each trained reward.

    Scores have four digits, cosines three. They are null where a reward does not apply or has no estimate. `kl` is the
    run's distance to the base at its end, which its gains are to be seen beside.

    Raises:
        ComparisonError: The run did not evaluate the base.
    """
    names, prompts = run.reward_models, run.results["prompts"]
    if run.base is None:
        raise ComparisonError(
            f"A comparison needs scores of the base. Found none in {run.folder}; set `num_sanity_val_steps: -1`."
        )

    def rows(key: str) -> list[list[float | None]]:
        values = ([prompt[key].get(name) for name in names] for prompt in prompts)
        return [[None if value is None else round(value, 4) for value in row] for row in values]

    scores = {"rewards": names, "base": rows("base"), "trained": rows("scores")}
    kl = None if run.distance is None else round(run.distance, 5)
    return scores | {"balancer": run.balancer, "kl": kl, **alignment_of(run, names)}


def alignment_of(run: Run, names: Sequence[str]) -> Result:
    """The part of `figures_of` about gradients: the rewards that have some, their cosines, and the chance and signal."""
    trained = [name for name in names if run.curve(f"cosine/update/own/{name}").values]

    def cosines(kind: str, place: str) -> list[list[float | None]]:
        curves = [dict(zip(*run.curve(f"cosine/{kind}/{place}/{name}"), strict=True)) for name in trained]
        steps = sorted({step for curve in curves for step in curve})
        return [[round(curve[step], 3) if step in curve else None for curve in curves] for step in steps]

    kinds = {place: weights_of(trained, [run], place) for place in PLACES}
    found: Result = {"trained_rewards": trained, "cosines": {place: cosines(kind, place) for place, kind in kinds.items()}}
    if kinds["own"] == "reused":
        found["solved"] = cosines("update", "own")
    if len(chance := chance_of([run])):
        found["chance"] = round(chance.mean(), 3)
    ratios = [run.curve(f"signal_to_noise/{name}").values[-1:] for name in trained]
    found["signal_to_noise"] = [round(ratio[0], 3) if ratio else None for ratio in ratios]
    return found


def as_tensor(rows: Sequence[Sequence[float | None]]) -> Float[Tensor, "row column"]:
    """Rows of scores as a matrix, NaN where there is none."""
    return torch.tensor([[torch.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)


def changes_of(results: Sequence[Result], names: Sequence[str]) -> Float[Tensor, "seed prompt reward"]:
    """Held-out changes, trained - base, of runs with the same prompts.

    Args:
        results: Figures of runs.
        names: Rewards and metrics, which become the columns.

    Raises:
        ComparisonError: A run has no scores of one of them, or the runs have different prompts.
    """
    changes = []
    for result in results:
        if missing := [name for name in names if name not in result["rewards"]]:
            raise ComparisonError(
                f"All runs must have scores of {', '.join(names)}. Found a run without {', '.join(missing)}."
            )
        columns = [result["rewards"].index(name) for name in names]
        changes.append((as_tensor(result["trained"]) - as_tensor(result["base"]))[:, columns])
    if len(sizes := {len(change) for change in changes}) > 1:
        raise ComparisonError(f"All runs must have the same held-out prompts. Found runs with {sorted(sizes)} of them.")
    return torch.stack(changes)
