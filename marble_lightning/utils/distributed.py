"""Communication between ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import Strategy
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger(__name__)

REPORT_EVERY = 300.0
"""Seconds between two warnings about a rank or a reward that others wait for."""
LONGEST_POLL = 0.2
"""Maximum seconds between two checks whether the other ranks have arrived."""

REMEDY = (
    "Read the log of the late rank. Bound its scoring by `model.scoring.time_limit` or a remote reward's `deadline`, or "
    "allow more time: `--trainer.strategy DDPStrategy --trainer.strategy.timeout 2:00:00`."
)

T = TypeVar("T")


class OnAllRanks:
    """Base of exceptions that every rank raises at the same point, so that ranks can wait for each other before they end."""


def gather_items(items: Sequence[T]) -> list[T]:
    """The items of all ranks, in the order of ranks; all ranks must call it, and all get the same list.

    Args:
        items: Items of this rank, picklable and not on a GPU.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(items)
    by_rank: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(by_rank, list(items))
    return [item for of_rank in by_rank for item in of_rank]


def wait_for_ranks(strategy: Strategy, action: str) -> None:
    """Wait until all ranks have called this equally often; a warning names the ranks that the others wait for.

    Call it before a collective that ranks may reach at very different times. If a rank is late, a collective's own time-out
    does not name it, and NCCL's ends the process.

    Args:
        strategy: Its process group's time-out is the maximum time to wait.
        action: What ranks do before they call this, for messages.

    Raises:
        TimeoutError: A rank has not arrived in time; raised on the ranks that wait.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    store, rank, begun = distributed.distributed_c10d._get_default_store(), distributed.get_rank(), time.monotonic()
    time_out = getattr(strategy, "_timeout", None) or default_pg_timeout
    calls, pause, report_at = store.add(f"calls of rank {rank}", 1), 0.001, REPORT_EVERY
    ranks = late = list(range(distributed.get_world_size()))
    while late := [other for other in late if store.add(f"calls of rank {other}", 0) < calls]:
        waited = time.monotonic() - begun
        message = (
            f"Rank {rank} has waited for {waited:.0f} s for rank {', '.join(map(str, late))} to finish {action}. "
            f"The time-out of the process group is {time_out.total_seconds():.0f} s."
        )
        if waited > time_out.total_seconds():
            raise TimeoutError(f"{message} {REMEDY}")
        if waited > report_at:
            report_at += REPORT_EVERY
            if rank == min(set(ranks).difference(late)):  # one of those that wait
                log.warning("%s %s", message, REMEDY)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL)


def broadcast_only(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make DistributedDataParallel broadcast only these parameters at its start.

    Every rank loads the frozen weights, gigabytes of them, and the buffers itself, and they are constant.

    Args:
        module: The module that it will wrap.
        parameters: Those that training changes.
    """
    sent = set(map(id, parameters))
    tensors = (*module.named_buffers(), *module.named_parameters())
    constant = [name for name, tensor in tensors if id(tensor) not in sent]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constant)
