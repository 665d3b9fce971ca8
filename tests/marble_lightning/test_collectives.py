"""What ranks send each other is on their devices: NCCL, which knows GPUs only, refuses a tensor of the CPU."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from marble_lightning.cli import QUIET, main

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class MarkCPU(TorchFunctionMode):
    """Marks tensors that would be on the CPU if the run's device were a GPU: by where they come from.

    `.cpu()`, `.to("cpu")` and a factory function without `device` give one, `.to(device)` and a factory function with a
    device do not; what is computed of one is one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("cpu", "to") and any(result is each for each in given):
            result = result.view_as(result)  # on a GPU it would be another tensor
        place = kwargs.get("device", args[1] if name == "to" and len(args) > 1 else None)
        if name == "cpu" or isinstance(place, str):
            mark = f"{name} in {caller()}"
        elif isinstance(place, torch.device):
            mark = ""
        elif name == "to" and len(given) > 1:  # where another tensor is
            mark = mark_of(given[1])
        elif name == "__getitem__":  # indices may be elsewhere
            mark = mark_of(given[0])
        elif given:  # a number of the CPU is welcome on a GPU
            mark = max(mark_of(each) if each.ndim or len(given) == 1 else "" for each in given)
        else:
            mark = f"{name} in {caller()}"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.mark = mark
        return result


def mark_of(tensor: Tensor) -> str:
    """Where a tensor of the CPU was made; "" of any other."""
    return getattr(tensor, "mark", "")


def caller() -> str:
    """The line outside torch that called a function."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    return f"{frames[-3].filename}:{frames[-3].lineno}"


def test_marks_follow_devices():
    device = torch.device("cpu")  # stands for a GPU
    with MarkCPU():
        here = torch.zeros(2, device=device)
        assert mark_of(torch.zeros(2)) and mark_of(here.cpu()) and mark_of(here.cpu().mean() * 2)
        assert not mark_of(here.mean()) and not mark_of(torch.zeros(2).to(device).sum())
        assert not mark_of(here * torch.tensor(2.0)) and not mark_of(here[torch.tensor([1])])


def test_no_tensor_of_the_cpu_is_sent(small, monkeypatch):
    """In a run with every callback, validations, refreshes and cheap steps, resumed once."""
    sent: list[str] = []

    def check(value: Any, what: str) -> None:
        sent.append(what)
        marks = [mark_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        assert not any(marks), f"{what} is on the CPU since {max(marks)}"

    def log(self: Any, name: str, value: Any, *arguments: Any, sync_dist: bool = False, **options: Any) -> None:
        if sync_dist:
            check(value, name)
        own_log(self, name, value, *arguments, sync_dist=sync_dist, **options)

    def reduce(self: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
        check(tensor, "reduce")
        return tensor

    def all_gather(self: Any, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        check(tensor, "all_gather")
        return tensor

    def run_stage(self: Any) -> None:  # once everything is loaded, and on its device
        with MarkCPU():
            own_run_stage(self)

    own_log, own_run_stage = LightningModule.log, Trainer._run_stage
    monkeypatch.setattr(Trainer, "_run_stage", run_stage)
    monkeypatch.setattr(LightningModule, "log", log)
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    monkeypatch.setattr(SingleDeviceStrategy, "all_gather", all_gather)
    options = [*small, "--harmony.probe_every", "1", "--trainer.check_val_every_n_epoch", "1"]
    main(["fit", *options, "--trainer.max_epochs", "1"])
    main(["fit", *options, "--ckpt_path", "last"])
    assert {"reduce", "all_gather", "held_out/pickscore", "train/ocr", "loss"} <= set(sent)
