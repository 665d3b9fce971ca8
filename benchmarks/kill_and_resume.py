"""Check that runs that are killed at random times and resumed end with the same weights as an uninterrupted run.

`python -m benchmarks.kill_and_resume --kills 24` kills a small run of configs/tiny.yaml with SIGKILL at seeded random
times, resumes each with `--ckpt_path last`, and compares adapters and optimizer of the last checkpoint bit for bit. It
prints a table in Markdown and exits with status 1 if anything differs. A finished trial is not repeated, so an interrupted
comparison resumes with the remaining trials. Other options are passed to `fit`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from marble_lightning.cli import main as marble_lightning

SMALL = {
    "trainer.max_epochs": 8,
    "trainer.check_val_every_n_epoch": 4,
    "trainer.enable_progress_bar": False,
    "data.prompts_per_round": 6,
    "data.images_per_prompt": 4,
    "data.held_out_per_source": 2,
    "data.held_out_images": 1,
    "balancer.refresh_every": 2,
    "model.sampling.steps": 4,
    "model.sampling.batch_size": 12,
    "model.evaluation.steps": 2,
    "model.micro_batch_size": 4,
    "model.optimizer_steps_per_round": 3,
    "memory.check": "off",
}
"""Options of `fit` for rounds of one or two seconds that run every part of a training run."""


def options(folder: Path, extra: Sequence[str]) -> list[str]:
    """Arguments of a small run that writes to a folder."""
    small = SMALL | {"trainer.logger.save_dir": folder, "trainer.default_root_dir": folder}
    return [
        "fit",
        "-c",
        "configs/tiny.yaml",
        *(part for key, value in small.items() for part in (f"--{key}", str(value))),
        *extra,
    ]


def fit(
    arguments: list[str],
    output: Path,
    folder: Path,
    kill_after: float | None = None,
    since: str = "config.yaml",
    imported: bool = True,
) -> tuple[int, float]:
    """Fit in a child process, and kill it if wanted. An exception in this process kills it too.

    Args:
        arguments: Arguments of the command line.
        output: File for its output.
        folder: Folder that the run writes to.
        kill_after: Seconds from the writing of the file `since` to the kill; None does not kill it.
        since: Name of a file of the run: its configuration, or `last.ckpt`.
        imported: Whether the child keeps this process's imports, which saves their time. False starts Python again, as
            CUDA needs if this process may have used it.

    Returns:
        Exit status, or minus the signal that ended it, and seconds from that file to the end.
    """
    before = set(folder.rglob(since))
    if not (process := os.fork()):
        _fit_here(arguments, output, imported)
    start: float | None = None
    ended = 0
    try:
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            now = time.monotonic()
            if start is None and set(folder.rglob(since)) - before:
                start = now
            if ended:
                return os.waitstatus_to_exitcode(status), now - (start or now)
            if kill_after is not None and start is not None and now - start >= kill_after:
                os.killpg(process, signal.SIGKILL)
                kill_after = None
            time.sleep(0.005)
    finally:
        if not ended:
            os.killpg(process, signal.SIGKILL)


def _fit_here(arguments: list[str], output: Path, imported: bool) -> NoReturn:
    """Fit in this process, a new child, and end it."""
    status: Any = 1
    try:
        os.setsid()  # its children are killed with it
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if not imported:
            os.execv(sys.executable, [sys.executable, "-m", "marble_lightning", *arguments])
        sys.argv = ["marble-lightning"]
        marble_lightning(arguments)
        status = 0
    except BaseException:  # noqa: BLE001 - the process ends here after any exception
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def last(folder: Path) -> Path | None:
    """The newest `last.ckpt` of a folder's runs."""
    return max(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def state(file: Path) -> dict[str, Any]:
    """The part of a checkpoint that training depends on."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # a process with CUDA cannot fork
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "global_step")}


def same(one: Any, other: Any) -> bool:
    """Whether nested states are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trial(
    index: int, seed: int, whole: float, expected: dict[str, Any], folder: Path, extra: Sequence[str]
) -> dict[str, Any]:
    """Kill one run and resume it.

    Args:
        index: Index of the trial.
        seed: Seed of the kill times.
        whole: Seconds that an uninterrupted run takes.
        expected: State that the resumed run must end with.
        folder: Folder of all trials.
        extra: Further options of `fit`.

    Returns:
        The trial's record.
    """
    run_folder, kill_time = folder / f"kill_{index:02d}", random.Random(f"{seed} {index}").uniform(0, whole)
    shutil.rmtree(run_folder, ignore_errors=True)  # left by an interrupted comparison
    run_folder.mkdir(parents=True)
    arguments, output = options(run_folder, extra), run_folder / "output.txt"
    status, _ = fit(arguments, output, run_folder, kill_after=kill_time)
    checkpoint = last(run_folder)
    steps = state(checkpoint)["global_step"] if checkpoint else 0
    record = {"kill": index, "seconds": kill_time, "status": status, "steps": steps}
    resumed, _ = fit([*arguments, "--ckpt_path", "last"], output, run_folder)
    if resumed:
        raise RuntimeError(f"A run killed after {kill_time:.2f} s must resume. Found status {resumed}; see {output}.")
    newest = last(run_folder)
    return record | {"same": newest is not None and same(expected, state(newest))}


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    chosen, extra = parser.parse_known_args()

    run_folder, records = chosen.folder / "whole", chosen.folder / "kills.jsonl"
    if not (run_folder / "seconds").exists():
        shutil.rmtree(run_folder, ignore_errors=True)
        run_folder.mkdir(parents=True)
        status, seconds = fit(options(run_folder, extra), run_folder / "output.txt", run_folder)
        if status:
            raise RuntimeError(f"The uninterrupted run must succeed. Found status {status}; see {run_folder}/output.txt.")
        (run_folder / "seconds").write_text(str(seconds))
    whole, checkpoint = float((run_folder / "seconds").read_text()), last(run_folder)
    assert checkpoint is not None
    trials = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    for index in range(len(trials), chosen.kills):
        trials.append(trial(index, chosen.seed, whole, state(checkpoint), chosen.folder, extra))
        with records.open("a") as file:
            file.write(json.dumps(trials[-1]) + "\n")
        print(f"{trials[-1]}", file=sys.stderr)
    print(table(trials, whole))
    sys.exit(0 if all(record["same"] for record in trials) else 1)


def table(trials: Sequence[dict[str, Any]], whole: float) -> str:
    """One line per kill, and the number of runs that ended with the same weights."""
    lines = [f"| kill | after, of {whole:.1f} s | status | optimizer steps in `last.ckpt` | same end |", "|---" * 5 + "|"]
    for record in trials:
        same_end = "yes" if record["same"] else "NO"
        lines.append(
            f"| {record['kill']} | {record['seconds']:.2f} s | {record['status']} | {record['steps']} | {same_end} |"
        )
    killed = [record for record in trials if record["status"] == -signal.SIGKILL]
    equal = sum(record["same"] for record in trials)
    lines.append(f"\n{len(killed)} of {len(trials)} were killed; {equal} end bit for bit the same.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
