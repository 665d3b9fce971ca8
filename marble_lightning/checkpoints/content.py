"""Checks of a checkpoint file before its content is used: intact records, all entries that `fit` writes, finite numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from marble_lightning.utils.atomic_files import local_path

LAST = "last.ckpt"

Content = Mapping[str, type | tuple[type, ...]]
"""Entries that a checkpoint must hold, with their types."""

TO_EXPORT: Content = {
    "lora": dict, "state_dict": dict, "epoch": int, "global_step": int, "base_model": dict, "rewards": list,
    "config": (str, type(None)),
}  # fmt: skip
TO_EVALUATE: Content = {
    **TO_EXPORT, "base_measured": str, "base_scores": (Tensor, type(None)), "trained_scores": (dict, type(None)),
    "loops": dict, "pytorch-lightning_version": str,
}  # fmt: skip
TO_FIT: Content = {**TO_EVALUATE, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}


class Refused(ValueError):
    """A checkpoint file cannot be used, but an earlier one may be usable."""


def find_corruption(path: str | Path) -> str | None:
    """Describe the corruption of a checkpoint file; None if every record is present and matches its checksum.

    torch.load does not compare checksums.
    """
    file = Path(path)
    if not file.exists():
        return f"it points to {os.readlink(file)}, which is gone" if file.is_symlink() else f"no such file from {Path.cwd()}"
    try:
        if not is_zipfile(file):
            return f"its end is missing, or it is no checkpoint ({file.stat().st_size} bytes)"
        with ZipFile(file) as archive:
            if any(record.compress_size != record.file_size or record.external_attr for record in archive.infolist()):
                return "its directory of records is wrong"  # torch compresses nothing and sets no attribute
            broken = archive.testzip()
    except (BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"it cannot be read: {error}"
    return f"its record {broken} does not match its checksum" if broken else None


def load_checked(path: str | Path, content: Content, **options: Any) -> dict[str, Any]:
    """Load a checkpoint of `fit`, and check the file before and its content after loading.

    Args:
        path: File on this machine, or its file:// URL.
        content: Required entries: `TO_EXPORT`, `TO_EVALUATE` or `TO_FIT`.
        options: Of torch.load.

    Raises:
        ValueError: The file is damaged, incomplete, not finite, or from another program; the message names one to use.
    """
    file = local_path("ckpt_path", path)
    if file.is_dir():
        inside = max(file.rglob(LAST), key=time_of, default=None)
        raise ValueError(f"`ckpt_path` must be a file. Found the folder {file}" + (f"; give {inside}" if inside else ""))
    try:
        return _load(file, content, **options)
    except Refused as refused:
        other = newest_usable(file, content if content is TO_EXPORT else TO_FIT)  # Lightning does not pass the purpose
        remedy = f"give the newest whole one: --ckpt_path {other}" if other else "there is no other whole one"
        raise ValueError(f"{refused}; {remedy}") from refused


def check_content(checkpoint: Any, content: Content, file: str | Path | None) -> None:
    """Refuse a checkpoint without an entry that `fit` writes, or with numbers that are not finite.

    Args:
        checkpoint: The loaded checkpoint.
        content: Required entries.
        file: Path of the file, for the error message.

    Raises:
        ValueError: The checkpoint is not usable; the message gives the reason.
    """
    if wrong := _wrong_entry(checkpoint, content):
        raise ValueError(
            f"`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, {file}: {wrong}."
        )
    tensors = {**checkpoint["state_dict"], **dict(_tensors(checkpoint.get("optimizer_states", []), "optimizer_states"))}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise Refused(
            f"`ckpt_path` must hold finite numbers. Found others in {len(broken)} of {len(tensors)} tensors of {file}, the "
            f"first in {broken[0]}: its training has diverged"
        )


def newest_usable(refused: Path, content: Content = TO_FIT) -> Path | None:
    """The newest usable checkpoint in the folder of a refused one, or else in other runs of the same name.

    Args:
        refused: Path of the refused checkpoint.
        content: Required entries.
    """
    folder = refused.parent
    for files in (folder.glob("*.ckpt"), folder.parent.parent.glob(f"*/{folder.name}/*.ckpt")):
        others = {file.resolve() for file in files if file.exists()} - {refused.resolve()}
        for file in sorted(others, key=time_of, reverse=True):
            if is_usable(file, content):
                return file
    return None


def is_usable(file: Path, content: Content = TO_FIT) -> bool:
    """Whether a file is a checkpoint of `fit` that is intact and finite and has the required entries."""
    try:
        _load(file, content, map_location="cpu", weights_only=True)
    except ValueError:
        return False
    return True


def time_of(file: Path) -> int:
    """Modification time of a file; for a broken link, of the link itself."""
    return (file.stat() if file.exists() else file.lstat()).st_mtime_ns


def _load(file: Path, content: Content, **options: Any) -> dict[str, Any]:
    if wrong := find_corruption(file):
        raise Refused(f"`ckpt_path` must be a whole checkpoint. Found {file}: {wrong}")
    try:
        checkpoint: dict[str, Any] = torch.load(file, **options)
    except UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise ValueError(
            "`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, or one in "
            f"which a callback of yours keeps what torch will not load, {file}: {reason.partition('. Please')[0]}."
        ) from error
    except RuntimeError as error:  # an error in the directory of records that zipfile accepts and torch does not
        raise Refused(f"`ckpt_path` must be a whole checkpoint. Found {file}: {error}") from error
    check_content(checkpoint, content, file)
    return checkpoint


def _wrong_entry(checkpoint: Any, content: Content) -> str | None:
    """Describe an entry that is missing or of the wrong type; None if there is none."""
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__} instead of a dictionary"
    if missing := [name for name in content if name not in checkpoint]:
        return f"without {', '.join(missing)}"
    for name, kind in content.items():
        if not isinstance(checkpoint[name], kind):
            return f"its {name} is a {type(checkpoint[name]).__name__}"
    if missing := [name for name in ("rank", "alpha", "targets") if name not in checkpoint["lora"]]:
        return f"its lora is without {', '.join(missing)}"
    if "loops" in content and "fit_loop" not in checkpoint["loops"]:
        return "its loops are without fit_loop"
    state = checkpoint["state_dict"]
    wrong = next((name for name, tensor in state.items() if not isinstance(tensor, Tensor)), None)
    return f"its state_dict holds a {type(state[wrong]).__name__} under {wrong!r}" if wrong is not None else None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries and lists, with their dotted path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}")
