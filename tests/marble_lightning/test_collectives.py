"""Tensors sent between ranks are on their devices, since NCCL has no CPU backend."""

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

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies import SD3Policy
from tests.helpers.small_rewards import Brightness

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


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
                leaf.mark = mark
        return result


def mark_of(tensor: Tensor) -> str:
    """The line that created a CPU tensor; "" for other tensors."""
    return getattr(tensor, "mark", "")


def caller() -> str:
    """The line outside torch that called a function."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    return f"{frames[-3].filename}:{frames[-3].lineno}"


def test_marks_follow_devices():
    device = torch.device("cpu")  # stands for a GPU
    with MarkCPU():
        on_device = torch.zeros(2, device=device)
        assert mark_of(torch.zeros(2)) and mark_of(on_device.cpu()) and mark_of(on_device.cpu().mean() * 2)
        assert not mark_of(on_device.mean()) and not mark_of(torch.zeros(2).to(device).sum())
        assert not mark_of(on_device * torch.tensor(2.0)) and not mark_of(on_device[torch.tensor([1])])


def test_held_out_scores_are_gathered_on_the_device(checkpoints):
    """A metric moves its inputs to its own device, and gathers them there."""
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2)
    module = DiffusionNFT(policy, {"bright": Brightness()}).to("meta")
    assert module.evaluator.scores.device == torch.device("meta")


@pytest.mark.integration
def test_no_cpu_tensor_is_sent(small, monkeypatch):
    """In a run with every callback, validations, refreshes and steps between them, resumed once."""
    sent: list[str] = []

    def check(value: Any, name: str) -> None:
        sent.append(name)
        marks = [mark_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        assert not any(marks), f"{name} is on the CPU since {max(marks)}"

    def log(self: Any, name: str, value: Any, *arguments: Any, sync_dist: bool = False, **options: Any) -> None:
        if sync_dist:
            check(value, name)
        original_log(self, name, value, *arguments, sync_dist=sync_dist, **options)

    def reduce(self: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
        check(tensor, "reduce")
        return tensor

    def all_gather(self: Any, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        check(tensor, "all_gather")
        return tensor

    def run_stage(self: Any) -> None:  # starts after weights are loaded and moved to their device
        with MarkCPU():
            original_run_stage(self)

    original_log, original_run_stage = LightningModule.log, Trainer._run_stage
    monkeypatch.setattr(Trainer, "_run_stage", run_stage)
    monkeypatch.setattr(LightningModule, "log", log)
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    monkeypatch.setattr(SingleDeviceStrategy, "all_gather", all_gather)
    options = [*small, "--gradient_alignment.probe_every", "1", "--trainer.check_val_every_n_epoch", "1"]
    main(["fit", *options, "--trainer.max_epochs", "1"])
    main(["fit", *options, "--ckpt_path", "last"])
    assert {"reduce", "all_gather", "held_out/pickscore", "train/ocr", "loss"} <= set(sent)
