"""Runs of the command line in child processes that stop at a chosen moment, also as a script."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from marble_lightning.cli import main
from marble_lightning.evaluation.evaluator import Evaluator
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers import ROOT
from tests.helpers.forks import start, wait


def at_call(number: int, owner: Any, name: str, do: Callable[..., None], counts: Callable[..., bool]) -> None:
    """Call `do` before the n-th call of a function among those for which `counts` is true."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def call(*arguments: Any, **options: Any) -> Any:
        if counts(*arguments, **options) and next(calls) == number:
            do(*arguments, **options)
        return real(*arguments, **options)

    setattr(owner, name, call)


def send(number: signal.Signals) -> Callable[..., None]:
    return lambda *arguments, **options: os.kill(os.getpid(), number)


def twice(*_: Any, **__: Any) -> None:
    for _number in range(2):
        os.kill(os.getpid(), signal.SIGINT)


def half(state: Any, stream: Any) -> None:
    """Write the first half of a checkpoint's bytes, then kill the process."""
    complete = io.BytesIO()
    SAVE(state, complete)
    stream.write(complete.getvalue()[: len(complete.getvalue()) // 2])
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def slurm(_: None = None) -> None:
    """Set the variables of a SLURM job with one task, with a `scontrol` that only records its calls."""
    os.environ["PATH"] = f"{ROOT / 'tests/helpers/slurm'}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {f"SLURM_{name}": value for name, value in {"JOB_ID": "1", "NTASKS": "1", "JOB_NAME": "fit"}.items()}
    os.environ |= {f"SLURM_{name}": "0" for name in ("LOCALID", "PROCID", "NODEID")}


def of_the_trained(self: Any, trainer: Any, batch: Any) -> bool:
    """Whether held-out images are those of the adapter; the base is evaluated before the first round."""
    return not trainer.sanity_checking


def a_rollout(self: Any, conditions: Any, generators: Any, adapter: str, **options: Any) -> bool:
    return adapter == "old"


SAVE = torch.save
TRAINING = (DiffusionNFT, "training_step")
HELD_OUT = (Evaluator, "sample")
MOMENTS: dict[str, Callable[[], None]] = {
    # two calls of `sample` and four micro-batches a round, two for each of two optimizer steps; two held-out batches
    "sampling": lambda: at_call(4, SD3Policy, "sample", send(signal.SIGKILL), a_rollout),
    "training": lambda: at_call(7, *TRAINING, send(signal.SIGKILL), lambda *_: True),
    "writing": lambda: at_call(2, torch, "save", half, lambda state, stream: not isinstance(stream, io.BytesIO)),
    "linking": lambda: at_call(2, os, "replace", send(signal.SIGKILL), lambda old, new: Path(new).name == "last.ckpt"),
    "SIGTERM in training": lambda: at_call(7, *TRAINING, send(signal.SIGTERM), lambda *_: True),
    "SIGTERM in sampling": lambda: at_call(3, SD3Policy, "sample", send(signal.SIGTERM), a_rollout),
    "SIGTERM in validation": lambda: at_call(1, *HELD_OUT, send(signal.SIGTERM), of_the_trained),
    "never": lambda: None,
    "SIGTERM before": lambda: at_call(1, *HELD_OUT, send(signal.SIGTERM), lambda *_: True),
    "SIGINT": lambda: at_call(7, *TRAINING, send(signal.SIGINT), lambda *_: True),
    "SIGINT twice": lambda: at_call(7, *TRAINING, twice, lambda *_: True),
    "SIGINT while evaluating": lambda: at_call(1, *HELD_OUT, send(signal.SIGINT), lambda *_: True),
    "SIGHUP": lambda: at_call(7, *TRAINING, send(signal.SIGHUP), lambda *_: True),
    "SIGUSR1": lambda: slurm(at_call(7, *TRAINING, send(signal.SIGUSR1), lambda *_: True)),
    "queued again": lambda: slurm(os.environ.update(SLURM_RESTART_COUNT="1")),
    "another job": slurm,
}


def run(moment: str, arguments: list[str]) -> None:
    MOMENTS[moment]()
    main(arguments)


def run_each(runs: list[tuple[str, list[str], str]]) -> list[int]:
    """Run moments and command lines, each in a child process that writes to a file; returns the exit statuses."""
    return [wait(start(partial(run, *arguments), Path(output))) for *arguments, output in runs]


if __name__ == "__main__":
    runs = json.loads(sys.argv[1])
    sys.argv = ["marble-lightning"]
    print(json.dumps(run_each(runs)))
