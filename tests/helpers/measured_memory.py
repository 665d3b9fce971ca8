"""What a run is estimated to take, and what it takes: the most bytes of CPU tensors alive, by the profiler's record.

As a script it measures in a process of its own: torch 2.13 crashes now and then where a profiler's record is freed, or
looked at through `acc_events`. So records are kept to the end, and the process ends without freeing them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import balancers
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.memory.estimate import Choices, Estimate, Estimator
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from tests.helpers.small_rewards import Brightness, Contrast, Redness

KEPT: list[profile] = []
"""Every profiler there was."""


class Estimated(Callback):
    """Keeps the estimate of a run at its start, and how to make others."""

    def on_fit_start(self, trainer, pl_module):
        self.estimator, self.choices = Estimator(pl_module), Choices.of(pl_module)
        self.estimate = self.estimator(self.choices)


def blocks_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of each block of memory that tensors share."""
    return {block.data_ptr(): block.nbytes() for block in (tensor.untyped_storage() for tensor in tensors)}


def most_alive(profiler: profile, before: Mapping[int, int] | None = None) -> int:
    """The most bytes alive at once of what was allocated under the profiler and of the blocks that were there `before`.

    Blocks are followed by their address. The sum of the profiler's own sizes is not exact: for a block from before the
    profiler it counts the size that an earlier record had at that address.
    """
    alive = dict(before or {})
    total = most = sum(alive.values())
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
            most = max(most, total)
    return most


def recorder() -> profile:
    """A profiler whose record is not freed."""
    KEPT.append(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
    return KEPT[-1]


class HeldOutScores(Callback):
    """Measures encoding, sampling, decoding, an optimizer step's micro-batches together, and the step itself."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def _keep(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def on_fit_start(self, trainer, pl_module):
        for name in ("encode", "sample", "decode"):
            setattr(pl_module.policy, name, self._recorded(name, getattr(pl_module.policy, name)))

    def _recorded(self, name: str, method: Any) -> Any:
        def recorded(*arguments: Any, **options: Any) -> Any:
            with recorder() as profiler:
                result = method(*arguments, **options)
            self._keep(name, most_alive(profiler))
            return result

        return recorded

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % pl_module.plan.per_step == 0:
            tensors = (batch.clean, batch.noise, batch.t, *vars(batch.conditions).values(), *batch.coefficients)
            self.begun_with = blocks_of(tensors)
            self.profiler = recorder()
            self.profiler.start()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.profiler.stop()
        self._keep("train", most_alive(self.profiler, self.begun_with))
        self.begun_with = ()
        self.profiler = recorder()
        self.profiler.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % pl_module.plan.per_step == 0:
            self.profiler.stop()
            self._keep("optimizer", most_alive(self.profiler))


def fitted(
    path: Path,
    folder: Path,
    balancer: str,
    checkpointing: bool,
    accelerator: str = "cpu",
    measured: Callback | None = None,
) -> Estimated:
    """A round of `configs/tiny.yaml`'s batches on the bundled model, or of small ones on the random one."""
    tiny = path == WEIGHTS / "sd3"
    module = DiffusionNFT(
        SD3Policy(
            str(path), resolution=32 if tiny else 16, rank=16 if tiny else 2, text_length=4, dtype="float32",
            gradient_checkpointing=checkpointing,
        ),
        rewards={"bright": Brightness(), "red": Redness(), "contrast": Contrast()},
        sampling=Sampling(steps=3, batch_size=108, times_per_image=1),
        scoring=Scoring(overlap=False),
        micro_batch_size=72,
    )  # fmt: skip
    estimated = Estimated()
    trainer = Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[getattr(balancers, balancer)(), estimated, *([measured] if measured else [])],
    )  # fmt: skip
    data = PromptDataModule(str(PROMPTS), ["ocr", "geneval"], prompts_per_round=12, images_per_prompt=12)
    trainer.fit(module, datamodule=data)
    return estimated


def counted(estimate: Estimate) -> dict[str, int]:
    """What `HeldOutScores` measures, as it was estimated."""
    beyond = {name: phase.beyond for name, phase in estimate.phases.items()}
    return {
        "encode": beyond["encoding prompts"],
        "sample": beyond["sampling"],
        "decode": beyond["decoding"],
        "train": beyond["training"] + estimate.parts["gradients"],
        "optimizer": beyond["optimizer step"] + estimate.parts["optimizer"],
    }


def both(path: str, balancer: str, checkpointing: bool) -> dict[str, tuple[int, int]]:
    """Bytes of each phase of a run, as estimated and as measured."""
    measured = HeldOutScores()
    with tempfile.TemporaryDirectory() as folder:
        expected = counted(fitted(Path(path), Path(folder), balancer, checkpointing, measured=measured).estimate)
    if balancer == "MARBLE":  # the merged gradient, from before, is let go within the step
        del expected["optimizer"]
    return {name: (size, measured.peaks[name]) for name, size in expected.items()}


if __name__ == "__main__":
    found = [both(*case) for case in json.loads(sys.argv[1])]
    print(json.dumps(found), flush=True)
    os._exit(0)
