"""What a run says about its memory and work: a table, an error before the first round, and what to change."""

from __future__ import annotations

import logging
from functools import partial
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from marble_lightning.memory.estimate import Estimate, estimate_memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.sharding import ShardedBaseStrategy

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

WITHOUT_DATA = (DataDependentOutputException, DynamicOutputShapeException)
"""What code raises that looks at numbers, and cannot be followed further without them: expected of rewards."""
GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB
"""CUDA's context and kernels, and workspaces of cuBLAS and cuDNN, which the count does not see."""
FRAGMENTATION = 1.1
"""CUDA's caching allocator may hold so many times what is in use, since freed blocks do not fit the next request. A run is
refused without this factor and warned about with it. `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` makes it near 1."""


def gib(size: float) -> str:
    """Bytes as text, in GiB, or in MiB below 1 GiB.

    >>> gib(3 * 2**29), gib(5 * 2**20)
    ('1.50 GiB', '5.0 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def tera(flops: float) -> str:
    """Floating-point operations as text, in TFLOP.

    >>> tera(2.5e15), tera(4e9), tera(0)
    ('2500', '0.0040', '')
    """
    return f"{flops / 1e12:{'.0f' if flops >= 1e14 else '.2g'}}" if flops else ""


def memory_table(found: Estimate, gpus: int = 1) -> Table:
    """Parts, then phases: what they need beyond the parts that are there, altogether, and what they compute in a round."""
    caption = f"On each of {gpus} GPUs. " if gpus > 1 else ""
    caption += f"CUDA itself needs about {gib(CUDA_CONTEXT)} more."
    minutes = found.flops / 100e12 / 60
    caption += f" At 100 TFLOP/s the {tera(found.flops)} TFLOP of a round take {minutes:.2g} minutes."
    if found.unknown:
        caption += f" Not counted, or in part: {', '.join(found.unknown)}."
    table = Table(title="GPU memory this run needs, an estimate", caption=caption, caption_justify="left")
    table.add_column("part, phase", no_wrap=True)
    for column in ("by itself", "altogether", "TFLOP a round"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, size in found.parts.items():
        if size:
            table.add_row(name, gib(size), "", "")
    table.add_section()
    for name, phase in found.phases.items():
        most = found.total(name) == found.peak
        sizes = gib(phase.beyond), gib(found.total(name))
        table.add_row(name, *sizes, tera(phase.flops), style="bold" if most else None)
    return table


def print_estimate(found: Estimate, gpus: int = 1) -> None:
    """Print the table, and warn about what could not be counted."""
    Console(width=110).print(memory_table(found, gpus))
    for name, cause in found.unknown.items():
        if not isinstance(cause, WITHOUT_DATA):
            warn(f"The memory of {name} is estimated in part only. Found {type(cause).__name__}: {cause}")


def savings(module: DiffusionNFT) -> str:
    """Settings that save memory and that a run does not use yet, those that cost least time first, a line each."""
    policy, scoring, trainer = module.policy, module.scorer.settings, module.trainer
    shares = isinstance(trainer.strategy, ShardedBaseStrategy) or trainer.num_devices == 1
    used = {
        "model.policy.offload_text_encoders true": getattr(policy, "offload_text_encoders", True),
        "model.policy.vae_slicing true": getattr(policy, "vae_slicing", True),
        "model.scoring.offload true": scoring.offload,
        "model.scoring.overlap false": not scoring.overlap,
        "model.policy.dtype bfloat16": getattr(policy, "dtype", None) != torch.float32,
        "model.policy.gradient_checkpointing true": getattr(policy, "gradient_checkpointing", True),
        "trainer.strategy.class_path marble_lightning.ShardedBaseStrategy": shares,
    }
    sizes = {"model.sampling.batch_size": module.sampling.batch_size, "model.micro_batch_size": module.sizes[0]}
    lines = [name for name, is_used in used.items() if not is_used]
    lines += [f"{name}, now {size}, smaller" for name, size in sizes.items() if size > 1]
    return "\n  --".join(["What helps:", *lines]) if lines else "What helps: a larger GPU, or several."


class Memory(Callback):
    """Estimates the memory that a run needs on its GPU before the first round, and stops a run that cannot fit.

    Every phase is run once on tensors without data, which takes seconds: encoding, sampling, decoding, scoring, a
    micro-batch forward and backward (one that computes per-reward gradients, where the balancer does), the optimizer. Added
    is what stays on the device: weights, adapters, optimizer state, rewards, the round's latents and images, and 0.6 GiB for
    CUDA itself. Memory of callbacks and workspaces of kernels are not counted. On a CPU nothing is estimated;
    `marble-lightning memory` prints the estimate on any machine.

    Args:
        check: `raise` stops a run that needs more than the GPU has, `warn` only warns, `off` estimates nothing.
    """

    def __init__(self, check: Literal["raise", "warn", "off"] = "raise") -> None:
        if check not in ("raise", "warn", "off"):
            raise ValueError(f"`check` must be raise, warn or off. Found {check!r}.")
        self.check = check

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, ShardedBaseStrategy):  # a sharded network cannot be copied
            trainer.strategy.before_sharding = partial(self._estimate, trainer, pl_module, trainer.num_devices)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, ShardedBaseStrategy):
            self._estimate(trainer, pl_module)

    def _estimate(self, trainer: Trainer, pl_module: LightningModule, shards: int = 1) -> None:
        device = trainer.strategy.root_device
        if self.check == "off" or device.type != "cuda" or not isinstance(pl_module, DiffusionNFT):
            return
        try:
            found = estimate_memory(pl_module, trainer.world_size, shards=shards)
        except Exception as error:  # noqa: BLE001 - a custom policy need not have the parts that are counted
            warn(f"The memory this run needs was not estimated. Found {type(error).__name__}: {error}")
            return
        if trainer.is_global_zero:
            print_estimate(found, trainer.world_size)
        free, total = torch.cuda.mem_get_info(device)
        self.compare(pl_module, found, total, free + torch.cuda.memory_reserved(device))

    def compare(self, module: DiffusionNFT, found: Estimate, total: int, free: int) -> None:
        """Refuse what cannot fit into a GPU's `total` bytes, and warn about what may not fit into those that are `free`.

        Raises:
            ValueError: `check` is raise, and the run cannot fit.
        """
        needed = found.peak + CUDA_CONTEXT
        if needed <= total and needed * FRAGMENTATION <= free:
            return
        needs = f"an estimate of {gib(found.peak)}, and {gib(CUDA_CONTEXT)} for CUDA itself"
        help_ = f"{savings(module)}\n`marble-lightning memory` estimates each without a GPU."
        if needed > total and self.check == "raise":
            raise ValueError(
                f"The run must fit into the GPU's {gib(total)}. Found {needs}. {help_}\n"
                "`--memory.check warn` starts it nevertheless."
            )
        warn(f"The run may not fit into the {gib(free)} that are free on the GPU: {needs}. {help_}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add what helps to an error of the allocator."""
        if isinstance(exception, torch.OutOfMemoryError) and isinstance(pl_module, DiffusionNFT):
            exception.add_note(f"{savings(pl_module)}\n`marble-lightning memory` estimates each without a GPU.")
