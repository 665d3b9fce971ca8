"""Forked child processes, alone or as the ranks of one run, which save the time of imports.

As a script this module runs command lines, each on two ranks.
"""

# ruff: noqa: F401 - the second block of imports is for the children, each of which would import them by itself

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import qpth.qp
import torch.utils.tensorboard
from diffusers import StableDiffusion3Pipeline
from diffusers.guiders import ClassifierFreeGuidance
from rapidocr import RapidOCR
from transformers import CLIPModel, CLIPTextModelWithProjection

import balancers
import rewards
from marble_lightning import tinyworld, trainer_commands
from marble_lightning.cli import main

LOADED = [getattr(package, name) for package in (balancers, rewards, tinyworld) for name in package.__all__]
"""Classes that these packages import when they are first used."""
gc.freeze()  # collections in a child would look at all of this, and so copy its memory


def start(run: Callable[[], Any], output: Path, environment: dict[str, str] | None = None) -> int:
    """Call a function in a child process that writes its output to a file; returns the process id."""
    if not (process := os.fork()):
        with output.open("a") as file:  # append, since other processes may write too
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status: Any = 1
        os.environ.update(environment or {}, OUTPUT_FILE=str(output))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored for background jobs of a shell
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
        try:
            run()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:  # noqa: BLE001 - the process ends here after any exception
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return process


def wait(process: int) -> int:
    """The exit status of a child process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def on_two_ranks(run: Callable[[], Any], output: Path) -> list[int]:
    """Call a function in two processes that Lightning treats as the ranks of one run; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environments = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)} for rank in range(2)]
    files = [output.with_suffix(f".{rank}") for rank in range(2)]
    return [wait(process) for process in [start(run, *arguments) for arguments in zip(files, environments, strict=True)]]


if __name__ == "__main__":
    output, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv = ["marble-lightning"]
    for command in commands:
        if any(on_two_ranks(partial(main, command), output)):
            sys.exit(output.with_suffix(".0").read_text()[-3000:])
