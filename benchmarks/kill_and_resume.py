"""Runs killed at random moments and resumed: do they end with the same weights as one that nobody killed?

`python -m benchmarks.kill_and_resume --kills 24` kills a small run of configs/tiny.yaml with SIGKILL at seeded random
moments, resumes each with `--ckpt_path last`, and compares adapters and optimizer of the last checkpoint bit for bit. It
prints a table in Markdown and ends with status 1 where anything differs. A finished trial is not repeated, so an interrupted
comparison continues with the rest. Other options go to `fit`.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
"""Options of `fit`: rounds of a second or two, in which every part of a run occurs."""


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


def fit(arguments: list[str], output: Path, folder: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Fit in a child process, forked so that imports are paid for once, and maybe kill it.

    Args:
        arguments: Of the command line.
        output: File for what it prints.
        folder: Where the run writes.
        kill_after: Seconds from when the run's configuration is written; None lets it end.

    Returns:
        Exit status, or minus the signal that ended it, and seconds from the configuration to the end.
    """
    before = set(folder.rglob("config.yaml"))
    if not (process := os.fork()):
        os.setsid()  # what it starts is killed with it
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status: Any = 1
        try:
            sys.argv = ["marble-lightning"]
            marble_lightning(arguments)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    begun = None
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        now = time.monotonic()
        if begun is None and set(folder.rglob("config.yaml")) - before:
            begun = now
        if ended:
            return os.waitstatus_to_exitcode(status), now - (begun or now)
        if kill_after is not None and begun is not None and now - begun >= kill_after:
            os.killpg(process, signal.SIGKILL)
            kill_after = None
        time.sleep(0.005)


def last(folder: Path) -> Path | None:
    """The newest `last.ckpt` of a folder's runs."""
    return max(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def state(file: Path) -> dict[str, Any]:
    """What training resumes from."""
    found = torch.load(file, weights_only=True)
    return {name: found[name] for name in ("state_dict", "optimizer_states", "global_step")}


def same(one: Any, other: Any) -> bool:
    """Whether nested states agree bit for bit."""
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
        index: Which one.
        seed: Of the moments.
        whole: Seconds that a run takes.
        expected: What it must end with.
        folder: Where it writes.
        extra: More options of `fit`.
    """
    place, moment = folder / f"kill_{index:02d}", random.Random(f"{seed} {index}").uniform(0, whole)
    shutil.rmtree(place, ignore_errors=True)  # what an interrupted comparison left
    place.mkdir(parents=True)
    arguments, output = options(place, extra), place / "output.txt"
    status, _ = fit(arguments, output, place, kill_after=moment)
    left = last(place)
    found = {"kill": index, "seconds": moment, "status": status, "steps": state(left)["global_step"] if left else 0}
    resumed, _ = fit([*arguments, "--ckpt_path", "last"], output, place)
    if resumed:
        raise RuntimeError(f"A run that was killed after {moment:.2f} s must resume. Found status {resumed}; see {output}.")
    newest = last(place)
    return found | {"same": newest is not None and same(expected, state(newest))}


def main() -> None:
    """Kill, resume, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    chosen, extra = parser.parse_known_args()

    place, record = chosen.folder / "whole", chosen.folder / "kills.jsonl"
    if not (place / "seconds").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        status, seconds = fit(options(place, extra), place / "output.txt", place)
        if status:
            raise RuntimeError(f"The run that nobody kills must end well. Found status {status}; see {place}/output.txt.")
        (place / "seconds").write_text(str(seconds))
    whole, end = float((place / "seconds").read_text()), last(place)
    assert end is not None
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for index in range(len(done), chosen.kills):
        done.append(trial(index, chosen.seed, whole, state(end), chosen.folder, extra))
        with record.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{done[-1]}", file=sys.stderr)
    print(table(done, whole))
    sys.exit(0 if all(each["same"] for each in done) else 1)


def table(done: Sequence[dict[str, Any]], whole: float) -> str:
    """One line per kill, and how many runs ended with the same weights."""
    lines = [f"| kill | after, of {whole:.1f} s | status | optimizer steps in `last.ckpt` | same end |", "|---" * 5 + "|"]
    for each in done:
        agree = "yes" if each["same"] else "NO"
        lines.append(f"| {each['kill']} | {each['seconds']:.2f} s | {each['status']} | {each['steps']} | {agree} |")
    killed = [each for each in done if each["status"] == -signal.SIGKILL]
    lines.append(
        f"\n{len(killed)} of {len(done)} were killed; {sum(each['same'] for each in done)} end bit for bit the same."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
