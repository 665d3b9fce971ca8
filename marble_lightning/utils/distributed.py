"""Things that ranks tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

T = TypeVar("T")


class OnAllRanks:
    """An exception that every rank raises at the same place, so that they may wait for each other before they end."""


def gathered(items: Sequence[T]) -> list[T]:
    """All ranks' items, rank by rank; all ranks must ask, and all get them.

    Args:
        items: This rank's, picklable and not on a GPU.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(items)
    everyone: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, list(items))
    return [item for own in everyone for item in own]
