"""The progress bar of a report."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Collection[Item], title: str, unit: str) -> Iterator[Item]:
    """The items, with a bar on a terminal's stderr that disappears at the end; no bar where stderr is no terminal."""
    yield from tqdm(items, desc=title, unit=unit, leave=False, disable=None)
