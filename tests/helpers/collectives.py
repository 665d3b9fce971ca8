"""Runs on two ranks in which a tensor on the CPU may not be sent, as with NCCL, and which count what is sent."""

from __future__ import annotations

import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marble_lightning.cli import main
from rewards import JPEGCompressibility
from tests.helpers.command_line import EXTRA, fit_with
from tests.helpers.forks import on_two_ranks
from tests.helpers.stopped import MOMENTS


class MarkCPU(TorchFunctionMode):
    """Marks tensors that would be on the CPU if the run's device were a GPU.

    `.cpu()`, `.to("cpu")` and factory functions without `device` return marked tensors; `.to(device)` and factory functions
    with a device do not. Results computed from a marked tensor are marked too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("cpu", "to") and any(result is tensor for tensor in inputs):
            result = result.view_as(result)  # on a GPU it would be a new tensor
        target = kwargs.get("device", args[1] if name == "to" and len(args) > 1 else None)
        if name == "cpu" or isinstance(target, str):
            mark = f"{name} in {caller()}"
        elif isinstance(target, torch.device):
            mark = ""
        elif name == "to" and len(inputs) > 1:  # `.to(other)` takes the device of another tensor
            mark = mark_of(inputs[1])
        elif name == "__getitem__":  # indices may be on another device
            mark = mark_of(inputs[0])
        elif inputs:  # a 0-dimensional CPU tensor is allowed in operations on a GPU
            mark = max(mark_of(tensor) if tensor.ndim or len(inputs) == 1 else "" for tensor in inputs)
        else:
            mark = f"{name} in {caller()}"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.mark = mark  # type: ignore[attr-defined]
        return result


def mark_of(tensor: Tensor) -> str:
    """The line that created a CPU tensor; "" for other tensors."""
    return getattr(tensor, "mark", "")


def caller() -> str:
    """The line outside torch that called a function."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    return f"{frames[-3].filename}:{frames[-3].lineno}"


class Collectives(TorchDispatchMode):
    """Counts the collectives of each phase, and refuses tensors that would be on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.counts = "before", defaultdict[str, Counter[str]](Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[1].split(".")[0].rstrip("_")
            self.counts[self.phase][name] += 1
            marks = {mark_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} - {""}
            assert not marks, f"{name} sends tensors that are on the CPU since {marks}"
        with torch._C.DisableTorchFunction():  # MarkCPU sees calls of Python, not those of PyTorch's own code
            return func(*args, **(kwargs or {}))


class Phases(Callback):
    """Tells what a run is at."""

    def __init__(self, found: Collectives) -> None:
        self.found = found

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self.found.phase = "evaluation"

    on_validation_start = on_sanity_check_start

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found.phase = "between"

    on_validation_end = on_train_start

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.found.phase = "images of a round"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % pl_module.plan.per_step == 0:
            self.found.phase = "plain step" if trainer.global_step % EXTRA["balancer.refresh_every"] else "refresh"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == pl_module.plan.per_step * 2:
            self.found.phase = "between"


def on_a_rank(moment: str, command: list[str], counted: str) -> None:
    """Run a command line, and write what the run has sent."""
    found, run_stage = Collectives(), Trainer._run_stage

    def marking(self: Trainer) -> Any:  # starts after weights are loaded and moved to their device
        with MarkCPU():
            return run_stage(self)

    Trainer._run_stage = marking  # type: ignore[method-assign]
    distributed_c10d._get_object_coll_device = lambda group=None: torch.device("cpu")  # with NCCL it would be the GPU
    if moment == "a reward fails":
        JPEGCompressibility.score = fail  # type: ignore[method-assign]
    else:
        MOMENTS[moment]()
    try:
        with found:
            fit_with(command[1:], Phases(found)) if command[0] == "fit" else main(command)
    finally:
        Path(f"{counted}.{torch.distributed.get_rank()}.json").write_text(json.dumps(found.counts))


def fail(*_: Any, **__: Any) -> Tensor:
    raise ConnectionResetError("the reader is gone")


def run_each(output: Path, runs: list[tuple[str, list[str]]]) -> list[list[int]]:
    """Run moments and command lines one after another, each on two ranks; returns their exit statuses."""
    calls: list[Callable[[], None]] = [partial(on_a_rank, *run, str(output / f"run_{n}")) for n, run in enumerate(runs)]
    return [on_two_ranks(call, output / f"output_{n}") for n, call in enumerate(calls)]
