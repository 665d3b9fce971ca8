"""What a checkpoint file must hold before anything of it is used: all its bytes, all that `fit` writes, finite numbers."""

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
"""What a checkpoint must hold: names and types."""

TO_EXPORT: Content = {"lora": dict, "state_dict": dict, "epoch": int, "global_step": int}
TO_EVALUATE: Content = {
    **TO_EXPORT, "base_model": dict, "base_measured": str, "base_scores": (Tensor, type(None)), "loops": dict,
    "pytorch-lightning_version": str,
}  # fmt: skip
TO_FIT: Content = {**TO_EVALUATE, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}


class Refused(ValueError):
    """A checkpoint file that cannot be used, though an earlier one may."""


def find_corruption(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, or None where it is whole: every record is there and matches its checksum.

    torch.load itself compares no checksums.
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
    """Load a checkpoint of `fit`, checked before and after.

    Args:
        path: File on this machine, or its file:// URL.
        content: What it is needed for: `TO_EXPORT`, `TO_EVALUATE` or `TO_FIT`.
        options: Of torch.load.

    Raises:
        ValueError: It is damaged, another program's, incomplete or not finite; says which one to give instead.
    """
    file = local_path("ckpt_path", path)
    if file.is_dir():
        inside = max(file.rglob(LAST), key=time_of, default=None)
        raise ValueError(f"`ckpt_path` must be a file. Found the folder {file}" + (f"; give {inside}" if inside else ""))
    try:
        return _checked(file, content, **options)
    except Refused as refused:
        other = newest_usable(file, content if content is TO_EXPORT else TO_FIT)  # Lightning does not say which it is for
        remedy = f"give the newest whole one: --ckpt_path {other}" if other else "there is no whole one beside it"
        raise ValueError(f"{refused}; {remedy}") from refused


def check_content(found: Any, content: Content, file: str | Path | None) -> None:
    """Refuse what lacks something that `fit` writes, and numbers that are not finite.

    Args:
        found: What a checkpoint holds.
        content: What it is needed for.
        file: Which it is.

    Raises:
        ValueError: With what is wrong.
    """
    if wrong := _lacking(found, content):
        raise ValueError(
            f"`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, {file}: {wrong}."
        )
    tensors = {**found["state_dict"], **dict(_tensors(found.get("optimizer_states", []), "optimizer_states"))}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise Refused(
            f"`ckpt_path` must hold finite numbers. Found others in {len(broken)} of {len(tensors)} tensors of {file}, the "
            f"first in {broken[0]}: its training has diverged"
        )


def newest_usable(refused: Path, content: Content = TO_FIT) -> Path | None:
    """The newest checkpoint of `fit`, whole and finite, beside one that is not, or else of the other runs of its name."""
    folder = refused.parent
    for found in (folder.glob("*.ckpt"), folder.parent.parent.glob(f"*/{folder.name}/*.ckpt")):
        others = {file.resolve() for file in found if file.exists()} - {refused.resolve()}
        for file in sorted(others, key=time_of, reverse=True):
            if is_usable(file, content):
                return file
    return None


def is_usable(file: Path, content: Content = TO_FIT) -> bool:
    """Whether a file is a checkpoint of `fit` that is whole, finite, and holds what is needed."""
    try:
        _checked(file, content, map_location="cpu", weights_only=True)
    except ValueError:
        return False
    return True


def time_of(file: Path) -> int:
    """When a file was written; of a link that leads nowhere, when it was made."""
    return (file.stat() if file.exists() else file.lstat()).st_mtime_ns


def _checked(file: Path, content: Content, **options: Any) -> dict[str, Any]:
    if wrong := find_corruption(file):
        raise Refused(f"`ckpt_path` must be a whole checkpoint. Found {file}: {wrong}")
    try:
        found: dict[str, Any] = torch.load(file, **options)
    except UnpicklingError as error:
        said = str(error).splitlines()
        why = next((line.strip() for line in said if "GLOBAL" in line or "Unsupported" in line), said[0])
        raise ValueError(
            "`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, or one in "
            f"which a callback of yours keeps what torch will not load, {file}: {why.partition('. Please')[0]}."
        ) from error
    except RuntimeError as error:  # a flaw in the directory of records that only torch minds
        raise Refused(f"`ckpt_path` must be a whole checkpoint. Found {file}: {error}") from error
    check_content(found, content, file)
    return found


def _lacking(found: Any, content: Content) -> str | None:
    if not isinstance(found, dict):
        return f"a {type(found).__name__} instead of a dictionary"
    if missing := [name for name in content if name not in found]:
        return f"without {', '.join(missing)}"
    for name, kind in content.items():
        if not isinstance(found[name], kind):
            return f"its {name} is a {type(found[name]).__name__}"
    if missing := [name for name in ("rank", "alpha", "targets") if name not in found["lora"]]:
        return f"its lora is without {', '.join(missing)}"
    if "loops" in content and "fit_loop" not in found["loops"]:
        return "its loops are without fit_loop"
    odd = next((name for name, tensor in found["state_dict"].items() if not isinstance(tensor, Tensor)), None)
    return f"its state_dict holds a {type(found['state_dict'][odd]).__name__} under {odd!r}" if odd is not None else None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries and lists, by where they are."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(inside, f"{name}.{key}")
