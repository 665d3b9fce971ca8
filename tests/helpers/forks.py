"""Forked child processes, alone or as the ranks of one run, which save the time of imports.

`call` uses a process that was forked after all imports and before the first test, so that nothing of a test is in it.
"""

# ruff: noqa: F401 - the second block of imports is for the children, each of which would import them by itself

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
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
from tests.helpers import ROOT

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


def on_two_ranks_each(commands: list[list[str]], output: Path) -> str:
    """Run command lines one after another, each on two ranks; returns the end of what the first failing one printed."""
    for command in commands:
        if any(on_two_ranks(partial(main, command), output)):
            return output.with_suffix(".0").read_text()[-3000:]
    return ""


class Clean:
    """The process without anything of a test, and the connection to it."""

    connection: Connection | None = None
    process: int


def prepare() -> None:
    """Fork the clean process."""
    here, there = Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, such as those of xdist
        process = os.fork()
    if not process:
        here.close()
        os.setsid()
        _forget_pytest()
        while not there.closed:
            _answer(there)
    there.close()
    Clean.connection, Clean.process = here, process


def call(function: Callable[..., Any], *arguments: Any, timeout: float = 280) -> Any:
    """What a function of a module returns in a new child of the clean process."""
    assert Clean.connection, "no clean process: it was not prepared, or a call to it did not end"
    connection, Clean.connection = Clean.connection, None
    try:
        connection.send((function, arguments))
        assert connection.poll(timeout), f"{function} did not end in {timeout} s"
        ended, result = connection.recv()
    except BaseException:
        os.killpg(Clean.process, signal.SIGKILL)
        raise
    Clean.connection = connection
    assert ended, result
    return result


def _answer(connection: Connection) -> None:
    """Wait for a call, and send what it returns, or how it failed; the process ends with the one that it answers."""
    try:
        request = connection.recv_bytes()
    except EOFError:
        os._exit(0)
    if not (process := os.fork()):
        try:
            function, arguments = pickle.loads(request)
            answer = True, function(*arguments)
        except BaseException:  # noqa: BLE001 - the caller raises an error with it
            answer = False, traceback.format_exc()
        connection.send(answer)
        os._exit(0)
    if status := wait(process):
        connection.send((False, f"exit status {status}"))


def _forget_pytest() -> None:
    """Undo what pytest changes while it collects tests: where output and warnings go."""
    os.chdir(ROOT)
    sys.argv = ["marble-lightning"]
    with open(os.devnull, "r+") as nothing:
        for number in range(3):
            os.dup2(nothing.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
