"""Estimated and measured memory of a run: peak bytes of live CPU tensors, from the profiler's records.

`measure` is for a separate process: torch 2.13 sometimes crashes when a profiler's record is freed, or read
through `acc_events`. So records are kept until the end, and the process ends without freeing them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import balancers
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.memory import Estimate, estimate_memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from tests.helpers.small_rewards import Brightness, Contrast, Redness

PROFILERS: list[profile] = []
"""All profilers, so that none is freed."""


class Estimated(Callback):
    """Keeps the estimate at the start of a run, for the device it runs on."""

    def on_fit_start(self, trainer, pl_module):
        self.estimate = estimate_memory(pl_module, cuda=trainer.strategy.root_device.type == "cuda")


def blocks_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of each block of memory that tensors share."""
    return {block.data_ptr(): block.nbytes() for block in (tensor.untyped_storage() for tensor in tensors)}


def peak_bytes(profiler: profile, before: Mapping[int, int] | None = None) -> int:
    """Peak bytes of the blocks allocated under the profiler and of the blocks that existed `before`.

    Blocks are tracked by their address. The sum of the profiler's sizes is not exact: for a block that is older than the
    profiler it uses the size that an earlier record had at that address.
    """
    alive = dict(before or {})
    total = peak = sum(alive.values())
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    events = []
    while pending:
        events.append(event := pending.pop())
        pending.extend(event.children)
    blocks = [event for event in events if event.tag == _EventType.Allocation]
    for event in sorted(blocks, key=lambda event: event.start_time_ns):
        block = event.extra_fields
        total -= alive.pop(block.ptr, 0)
        if block.alloc_size > 0:
            alive[block.ptr] = block.alloc_size
            total += block.alloc_size
            peak = max(peak, total)
    return peak


def recorder() -> profile:
    """A new profiler that is never freed."""
    PROFILERS.append(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
    return PROFILERS[-1]


class MeasuredPeaks(Callback):
    """Measures the peaks of encoding, sampling, decoding, the micro-batches of an optimizer step, and the step itself."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def _keep(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def on_fit_start(self, trainer, pl_module):
        for name, place in (("encode", 0), ("sample", 1), ("decode", 0)):  # the arguments texts, generators and latents
            setattr(pl_module.policy, name, self._recorded(name, getattr(pl_module.policy, name), place))

    def _recorded(self, name: str, method: Any, place: int) -> Any:
        def recorded(*arguments: Any, **options: Any) -> Any:
            size = len(arguments[place])
            if name in self.sizes:  # records take seconds, and those of a smaller batch cannot raise the peak
                assert size <= self.sizes[name], f"{name}: a batch of {size} after the recorded one of {self.sizes[name]}"
                return method(*arguments, **options)
            self.sizes[name] = size
            with recorder() as profiler:
                result = method(*arguments, **options)
            self._keep(name, peak_bytes(profiler))
            return result

        return recorded

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % pl_module.plan.per_step == 0:
            tensors = (batch.clean, batch.noise, batch.t, *batch.conditions.tensors.values(), *batch.coefficients)
            self.blocks_before = blocks_of(tensors)
            self.profiler = recorder()
            self.profiler.start()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.profiler.stop()
        self._keep("train", peak_bytes(self.profiler, self.blocks_before))
        self.blocks_before = ()
        self.profiler = recorder()
        self.profiler.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % pl_module.plan.per_step == 0:
            self.profiler.stop()
            self._keep("optimizer", peak_bytes(self.profiler))


def fitted(
    path: Path,
    folder: Path,
    balancer: str,
    checkpointing: bool,
    accelerator: str = "cpu",
    measured: Callback | None = None,
    prompts: int = 12,
) -> Estimated:
    """Train one round with the batches of `configs/tiny.yaml`, on the bundled model or on a small random one.

    With fewer prompts there are fewer batches, of the same sizes.
    """
    tiny = path == WEIGHTS / "sd3"
    module = DiffusionNFT(
        SD3Policy(
            str(path), resolution=64 if tiny else 16, rank=16 if tiny else 2, text_length=1 if tiny else 4, dtype="float32",
            gradient_checkpointing=checkpointing,
        ),
        rewards={"bright": Brightness(), "red": Redness(), "contrast": Contrast()},
        sampling=Sampling(steps=3, batch_size=54, times_per_image=1),
        scoring=Scoring(overlap=False),
        micro_batch_size=36,
    )  # fmt: skip
    estimated = Estimated()
    trainer = Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[getattr(balancers, balancer)(), estimated, *([measured] if measured else [])],
    )  # fmt: skip
    data = PromptDataModule(str(PROMPTS), ["ocr", "geneval"], prompts_per_round=prompts, images_per_prompt=12)
    trainer.fit(module, datamodule=data)
    return estimated


def counted(estimate: Estimate) -> dict[str, int]:
    """The estimates of the peaks that `MeasuredPeaks` measures."""
    beyond = {name: phase.beyond for name, phase in estimate.phases.items()}
    return {
        "encode": beyond["encoding prompts"],
        "sample": beyond["sampling"],
        "decode": beyond["decoding"],
        "train": beyond["training"] + estimate.parts["gradients"],
        "optimizer": beyond["optimizer step"] + estimate.parts["optimizer"],
    }


def both(path: str, balancer: str, checkpointing: bool) -> dict[str, tuple[int, int]]:
    """Estimated and measured bytes of each phase of a run."""
    measured = MeasuredPeaks()
    # without oneDNN, whose convolutions have their result twice, in its own layout and in torch's, as no GPU does
    with torch.backends.mkldnn.flags(enabled=False), tempfile.TemporaryDirectory() as folder:
        run = fitted(Path(path), Path(folder), balancer, checkpointing, measured=measured, prompts=6)
        expected = counted(run.estimate)
    if balancer == "MARBLE":  # the merged gradient, allocated before, is freed during the step
        del expected["optimizer"]
    return {name: (size, measured.peaks[name]) for name, size in expected.items()}


def measure(cases: list[tuple[str, str, bool]]) -> list[dict[str, tuple[int, int]]]:
    """Estimated and measured bytes of each phase, by run."""
    return [both(*case) for case in cases]
