"""Atomic files: after a kill or a loss of power, a file is either complete or absent."""

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
except ImportError:  # Windows; scratch folders of killed processes are not removed there
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".unfinished"
"""Suffix of a scratch folder's name, which begins with a dot and the name of the file that is written there."""
LOCK = ".lock"
"""File in a scratch folder that is locked while its process lives; the system releases the lock after a kill too."""


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A context with a scratch path to write to; at its end the written file is flushed to disk and renamed to `file`.

    Several processes may write the same file; the last one wins. After an error the scratch file is removed.

    Args:
        file: Path of the file; its folder is created if it does not exist.
    """
    with scratch_for(file) as scratch:
        yield scratch
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(scratch, file)
    folder_to_disk(file.parent)


@contextmanager
def scratch_for(file: Path) -> Iterator[Path]:
    """A context with a path in a new scratch folder beside `file`, under the same name; the folder is removed at its end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}.", suffix=SCRATCH, dir=file.parent))
        with suppress(FileNotFoundError):  # another process removed it as the folder of a killed process
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

    The folder of a living process is locked, even if the process runs on another machine. On a file system without locks no
    folder is removed.

    Args:
        folders: Folders in which files were written.
    """
    for folder in folders:
        for scratch in folder.glob(f".*{SCRATCH}"):
            with suppress(OSError):  # it was removed meanwhile, or belongs to another user
                handle = os.open(scratch / LOCK, os.O_CREAT | os.O_WRONLY, 0o600)
                try:
                    if _lock(handle, wait=False):
                        shutil.rmtree(scratch, ignore_errors=True)
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file against other processes; false if another process has the lock, or if there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def local_path(name: str, path: str | Path) -> Path:
    """The path of a file on this machine, given as a path or as a file:// URL.

    Args:
        name: Name of the setting.
        path: Its value; `~` is the home folder.

    Raises:
        ValueError: It is the URL of a remote file. Libraries would load such a file without the checks of local files.
    """
    text = str(path)
    parts = urlsplit(text) if text.startswith("file://") else None
    if parts is not None and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    if re.search(r"^[A-Za-z][\w+.-]+:/|://", text):  # pathlib replaces two slashes by one
        raise ValueError(
            f"`{name}` must be a file on this machine, so that it is checked before it is loaded. Found the URL {text}; "
            "download it, and give the path of the copy."
        )
    return Path(text).expanduser()


def check_folder(name: str, folder: Path) -> None:
    """Refuse a path that cannot be a folder, because a file or a broken link is at the path or at one of its parents.

    Args:
        name: Name of the setting.
        folder: Its value.

    Raises:
        ValueError: The path cannot be a folder; the message names the file.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise ValueError(f"`{name}` must be a folder. Found a file, or a broken link, {existing}; choose another.")


def folder_to_disk(folder: Path) -> None:
    """Flush a folder's entries to disk, if the file system can, so that they survive a loss of power."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)
