"""Communication between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

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
