"""LoRA files: writing files that diffusers and ComfyUI read, and reading files that adapters start from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from marble_lightning.policies.lora import Lora
from marble_lightning.policies.lora_formats import PREFIX, UNSUPPORTED, some, to_diffusers
from marble_lightning.policies.pipeline_kinds import SD3, PipelineKind
from marble_lightning.utils.atomic_files import atomic_write, local_path

FILE = LORA_WEIGHT_NAME_SAFE
"""File name of a LoRA that diffusers looks for in a folder."""

FILES = (FILE, LORA_WEIGHT_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
"""File names of diffusers and PEFT, in the order in which a folder is searched for them."""

HEADER_PREFIX = "marble_lightning."
"""Prefix of this package's entries in a file's header."""

ALPHA = f"{HEADER_PREFIX}alpha"

LORA_TENSOR = re.compile(r"transformer\..+\.lora_[AB]\.weight")
"""Names of the tensors of the transformer's LoRA."""


def write_lora(lora: Lora, folder: Path, targets: Sequence[str], about: Mapping[str, str], kind: PipelineKind = SD3) -> Path:
    """Write a LoRA that has the right scale for every reader.

    Diffusers reads alpha from the LoraConfig in the header. Its older versions assume that alpha equals the rank. ComfyUI
    looks for a tensor that diffusers refuses, and scales by 1 without it. So B is multiplied by alpha / rank in the file,
    and its LoraConfig says alpha = rank. The header keeps the policy's alpha, with which `read_lora` reverses the scaling.

    Args:
        lora: The LoRA to write.
        folder: Folder for `pytorch_lora_weights.safetensors`, which is written atomically; created if it does not exist.
        targets: The policy's `targets`.
        about: Further entries of the header; their names are prefixed with `marble_lightning.`.
        kind: The pipeline that loads it.

    Returns:
        Path of the file.
    """
    layers = lora.scaled(lora.alpha / lora.rank)
    # Only values that differ from peft's defaults: an older peft refuses fields that it does not know.
    config = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": list(targets)}
    with atomic_write(folder / FILE) as file:
        kind.pipeline_class.save_lora_weights(
            file.parent, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
        )
        entries = {f"{HEADER_PREFIX}{name}": text for name, text in about.items()}
        header = _header(file) | {ALPHA: repr(float(lora.alpha))} | entries
        content = save(load_file(file), metadata=header)
        file.unlink()  # `save_file` creates files that only their owner can read
        file.write_bytes(content)
    return folder / FILE


def read_lora(path: str, *, rank: int, alpha: float, kind: PipelineKind = SD3) -> Lora:
    """Read a LoRA for a transformer of the given rank and alpha.

    Args:
        path: A LoRA file, or a folder with one: of `marble-lightning export`, in any format that the pipeline loads, or of
            PEFT.
        rank: Rank that it must have, >= 1.
        alpha: Alpha that it must have; if a file has none, its alpha is its rank, as in diffusers.
        kind: The pipeline of the transformer.

    Raises:
        ValueError: There is no such file, it is damaged or not a plain LoRA, or its rank or alpha differs.
    """
    file = _file(local_path("policy.init_lora", path))
    try:
        state, metadata = kind.pipeline_class.lora_state_dict(
            str(file), return_lora_metadata=True, use_safetensors=True if file.suffix == ".safetensors" else None
        )
        header = _header(file) if file.suffix == ".safetensors" else {}
    except (OSError, SafetensorError, KeyError, ValueError) as error:  # the last two from a conversion of names
        raise ValueError(
            f"`policy.init_lora` must be a LoRA file for a {kind.pipeline}. Found a damaged or another file, "
            f"{file}: {error}."
        ) from error
    state, config_fields = to_diffusers(_whole(state, file), file)
    if odd := [name for name, tensor in state.items() if not LORA_TENSOR.fullmatch(name) or tensor.ndim != 2]:
        raise ValueError(
            f"`policy.init_lora` must hold a LoRA of the transformer's linear layers only. Found {some(odd)} in {file}; "
            "remove other layers, and convert names of other programs to those of diffusers."
        )
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"`policy.init_lora` must hold finite numbers. Found others in {some(broken)} of {file}.")
    tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()}
    fields = {name.removeprefix(PREFIX): value for name, value in (metadata or {}).items() if name.startswith(PREFIX)}
    config = _config(tensors, config_fields or fields, file)
    file_alpha = float(header.get(ALPHA, config.lora_alpha))
    if (config.r, file_alpha) != (rank, alpha):
        raise ValueError(
            f"`policy.init_lora` must have the policy's rank and alpha, {rank} and {alpha:g}. Found {config.r} and "
            f"{file_alpha:g} in {file}; set `policy.rank` and `policy.alpha` to these."
        )
    lora = Lora(tensors, rank, alpha, str(file))
    return replace(lora, tensors=lora.scaled(config.lora_alpha / file_alpha))  # `write_lora` multiplied B


def _whole(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a file, checked to be all: diffusers leaves those of DoRA out, which change the update."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
            converted = state.keys().isdisjoint(names)  # all have other names then
            if dropped := [name for name in names if ("dora_scale" in name if converted else name not in state)]:
                raise ValueError(f"`policy.init_lora` must be a plain LoRA. Found {some(dropped)} in {file}.")
    return state


def _config(tensors: Mapping[str, Tensor], fields: dict[str, Any], file: Path) -> LoraConfig:
    """The LoraConfig of a file; without one, the LoraConfig that diffusers derives from the tensors."""
    if not fields:
        ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name})
        if len(ranks) != 1:
            raise ValueError(f"`policy.init_lora` must be a LoRA of one rank. Found ranks {ranks} in {file}.")
        fields = {"r": ranks[0], "lora_alpha": ranks[0]}
    try:
        config = LoraConfig(**fields)
    except TypeError as error:
        raise ValueError(f"`policy.init_lora` must have a LoraConfig. Found {fields} in {file}.") from error
    if unsupported := {name: getattr(config, name) for name in UNSUPPORTED if getattr(config, name)}:
        raise ValueError(f"`policy.init_lora` must be a plain LoRA of one rank and alpha. Found {unsupported} in {file}.")
    return config


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _file(path: Path) -> Path:
    """The LoRA file at a path, which may be its folder."""
    if not path.exists():
        raise ValueError(
            f"`policy.init_lora` must be a LoRA file or a folder with one. Found no such file {path} from {Path.cwd()}; "
            "null starts at the base model, and a checkpoint (--ckpt_path) needs no `init_lora`."
        )
    if path.is_file():
        return path
    standard = [path / name for name in FILES if (path / name).is_file()]
    files = standard[:1] or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"`policy.init_lora` must be a folder with {FILE} or one other safetensors file. Found {len(files)} in {path}; "
            "use the path of the file."
        )
    return files[0]
