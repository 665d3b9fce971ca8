"""Files that are there whole or not at all, whatever ends the process or takes the machine's power."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

try:
    import fcntl
except ImportError:  # Windows, where scratch folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".unfinished"
"""End of a scratch folder's name, which begins with a dot and the name of the file that is written there."""
LOCK = ".lock"
"""File in a scratch folder that is locked for as long as its process lives; the system lets go of it after a kill too."""


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Where to write what becomes a file in one step, once it is written and the disk has it.

    Several processes may write the same file; the last one's stays. What was written by one that failed is removed.

    Args:
        file: In a folder that is made where it does not exist.
    """
    with scratch_for(file) as beside:
        yield beside
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, file)
    folder_to_disk(file.parent)


@contextmanager
def scratch_for(file: Path) -> Iterator[Path]:
    """Where to prepare what takes a file's place: the same name in a folder of its own beside, which is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}.", suffix=SCRATCH, dir=file.parent))
        with suppress(FileNotFoundError):  # another process took it for one that a kill has left
            handle = os.open(folder / LOCK, os.O_CREAT | os.O_WRONLY, 0o600)
            _lock(handle, wait=True)
            if folder.exists():
                break
            os.close(handle)
    try:
        yield folder / file.name
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Remove the scratch folders of processes that were killed.

    One whose process is alive is locked, on whichever machine that is; where the file system knows no locks all stay.

    Args:
        folders: Where files were written.
    """
    for folder in folders:
        for scratch in folder.glob(f".*{SCRATCH}"):
            with suppress(OSError):  # it is gone meanwhile, or is another user's
                handle = os.open(scratch / LOCK, os.O_CREAT | os.O_WRONLY, 0o600)
                try:
                    if _lock(handle, wait=False):
                        shutil.rmtree(scratch, ignore_errors=True)
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file against other processes; false where another one has it, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def local_path(name: str, path: str | Path) -> Path:
    """The path of a file on this machine, also where it is given as a file:// URL.

    Args:
        name: Of the setting.
        path: What it says; `~` is the home folder.

    Raises:
        ValueError: It is a URL of elsewhere. Libraries would load such a file without the checks of local ones.
    """
    text = str(path)
    parts = urlsplit(text) if text.startswith("file://") else None
    if parts is not None and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    if re.search(r"^[A-Za-z][\w+.-]+:/|://", text):  # pathlib makes one slash of two
        raise ValueError(
            f"`{name}` must be a file on this machine, so that it is checked before it is loaded. Found the URL {text}; "
            "download it, and give the path of the copy."
        )
    return Path(text).expanduser()


def check_folder(name: str, folder: Path) -> None:
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
