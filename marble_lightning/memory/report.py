"""Before the first round: how much memory the run needs beside what the device has, and what to change where it is less."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from marble_lightning.memory.estimate import Choices, Estimate, Estimator
from marble_lightning.module import DiffusionNFT

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

WITHOUT_DATA = (DataDependentOutputException, DynamicOutputShapeException)
"""What code raises that looks at numbers, and cannot be followed further without them: expected of rewards."""
GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB
"""CUDA's context and kernels, and workspaces of cuBLAS and cuDNN, of which the count knows nothing."""
FRAGMENTATION = 1.1
"""CUDA's caching allocator may hold so many times what is in use, as freed blocks do not fit what is asked for next. A run
is refused without this factor and warned of with it; settings are only recommended where they fit with it.
`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` makes it near to 1."""


class Room(NamedTuple):
    """Bytes that a device has, and that are free for this process, its own included; None where it cannot be told."""

    total: int | None
    free: int | None


def room_of(device: torch.device) -> Room:
    """What a device has: the GPU's memory, or the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, free + torch.cuda.memory_reserved(device))
    return Room(_system("SC_PHYS_PAGES"), _system("SC_AVPHYS_PAGES"))


def _system(pages: str) -> int | None:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS does not know all names
        return None


def gib(size: float) -> str:
    """Bytes as text, in GiB.

    >>> gib(3 * 2**29), gib(5 * 2**20)
    ('1.50 GiB', '0.005 GiB')
    """
    return f"{size / GIB:.{2 if size >= GIB else 3}f} GiB"


def memory_table(estimate: Estimate, room: Room) -> Table:
    """Parts, then phases with what they need beyond the parts that are there, and altogether."""
    caption = f"This device has {gib(room.total) if room.total else 'an unknown amount'}"
    caption += f", {gib(room.free)} free." if room.free else "."
    if estimate.unknown:
        caption += f" Not counted, or in part: {', '.join(estimate.unknown)}."
    table = Table(title="Memory this run needs, an estimate", caption=caption, caption_justify="left")
    for column, justify in (("part, phase", "left"), ("by itself", "right"), ("altogether", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, size in estimate.parts.items():
        if size:
            table.add_row(name, gib(size), "")
    table.add_section()
    for name, phase in estimate.phases.items():
        most = estimate.total(name) == estimate.peak
        table.add_row(name, gib(phase.beyond), gib(estimate.total(name)), style="bold" if most else None)
    return table


def remedies(estimator: Estimator, choices: Choices, limit: float) -> list[str]:
    """Settings that help, each with what the run then needs; last those that do together.

    Args:
        estimator: Of the run.
        choices: Its settings.
        limit: Bytes to stay below.
    """
    told, merged, names = [], dict[str, Any](), dict[str, str]()
    before = now = estimator(choices).above(limit)
    for name, change in choices.others(estimator.module).items():
        alone = estimator(replace(choices, **change))
        if alone.above(limit) >= before:
            continue
        told.append(f"--{name}: {gib(alone.peak)}")
        if now:
            now = estimator(replace(choices, **merged | change)).above(limit)
            merged |= change
            names |= dict.fromkeys(change, f"--{name}")
    if len(merged) > 1:
        told.append(f"{' '.join(names.values())}: {gib(estimator(replace(choices, **merged)).peak)}")
    return told


class Memory(Callback):
    """Prints the memory a run needs before its first round, and stops one that cannot fit, with settings that would.

    Every phase is run once on tensors without data, which takes seconds: encoding, sampling and decoding at the sampling
    batch, scoring, a micro-batch forward and back (one that asks for per-reward gradients, where the balancer does), the
    optimizer. What stays on the device is added: weights, adapters, optimizer state, rewards, the round's latents and
    images. On a GPU there come 0.6 GiB for CUDA itself. Callbacks' own memory is not counted, but for the alarms'
    statistics; nor are kernels' workspaces.

    Args:
        check: `raise` stops a run that needs more than the GPU has, `warn` only tells of it, `off` counts nothing. On a CPU
            the memory is only told.
    """

    def __init__(self, check: Literal["raise", "warn", "off"] = "raise") -> None:
        if check not in ("raise", "warn", "off"):
            raise ValueError(f"`check` must be raise, warn or off. Found {check!r}.")
        self.check = check

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.check == "off" or not isinstance(pl_module, DiffusionNFT):
            return
        device = trainer.strategy.root_device
        try:
            estimator, choices = Estimator(pl_module), Choices.of(pl_module)
            estimate = estimator(choices)
        except Exception as error:  # noqa: BLE001 - a policy may be anyone's, and its run need not wait for an estimate
            warn(f"The memory this run needs was not estimated. Found {type(error).__name__}: {error}")
            return
        room = room_of(device)
        if trainer.is_global_zero:
            Console(width=110).print(memory_table(estimate, room))
        for name, cause in estimate.unknown.items():
            if not isinstance(cause, WITHOUT_DATA):
                warn(f"The memory of {name} is estimated in part only. Found {type(cause).__name__}: {cause}")
        if device.type == "cuda" and room.total and room.free:
            self._score(estimator, choices, estimate, room.total, room.free)

    def _score(self, estimator: Estimator, choices: Choices, estimate: Estimate, total: int, free: int) -> None:
        """Refuse what cannot fit, and warn of what may not."""
        needed = estimate.peak + CUDA_CONTEXT
        if needed <= total and needed * FRAGMENTATION <= free:
            return
        found = f"an estimate of {gib(estimate.peak)}, and {gib(CUDA_CONTEXT)} for CUDA itself"
        help_ = "\n  ".join(remedies(estimator, choices, min(free, total) / FRAGMENTATION - CUDA_CONTEXT)) or "a larger GPU"
        if needed > total and self.check == "raise":
            raise ValueError(
                f"The run must fit into the GPU's {gib(total)}. Found {found}. What helps:\n  {help_}\n"
                "`--memory.check warn` lets it begin regardless."
            )
        warn(f"The run may not fit into the {gib(free)} that are free on the GPU: {found}. What helps:\n  {help_}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add what helps to an error of the allocator: weights are on the device before a run begins, and may not fit."""
        if self.check == "off" or not isinstance(exception, torch.OutOfMemoryError):
            return
        if not isinstance(pl_module, DiffusionNFT) or not hasattr(pl_module, "plan"):
            return
        limit = (room_of(trainer.strategy.root_device).total or 0) / FRAGMENTATION - CUDA_CONTEXT
        try:
            estimator, choices = Estimator(pl_module), Choices.of(pl_module)
            help_ = "\n  ".join(remedies(estimator, choices, limit)) or "a larger GPU"
            exception.add_note(f"The run needs about {gib(estimator(choices).peak)}. What helps:\n  {help_}")
        except Exception as error:  # noqa: BLE001 - as above; and the checkpoint of the round's beginning is yet to be written
            warn(f"What would help was not estimated. Found {type(error).__name__}: {error}")
