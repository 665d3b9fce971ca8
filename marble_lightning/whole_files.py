"""Files that are there whole or not at all, whatever ends the process or takes the machine's power."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write what becomes a file in one step, once it is written and the disk has it.

    Several processes may write the same file; the last one's stays. What was written by one that failed is removed.

    Args:
        file: In a folder that is made where it does not exist.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent, ignore_cleanup_errors=True) as scratch:
        beside = Path(scratch, file.name)
        yield beside
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, file)
    folder_to_disk(file.parent)


def must_be_a_folder(name: str, folder: Path) -> None:
    """Refuse where a folder cannot be, or be made, because a file is there.

    Args:
        name: Of the setting.
        folder: What it says.

    Raises:
        ValueError: With the file.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise ValueError(f"`{name}` must be a folder. Found a file, or a link that leads nowhere, {there}; choose another.")


def folder_to_disk(folder: Path) -> None:
    """Have a folder's names survive a loss of power, where the file system can do so."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)
