"""A checkpoint's adapter as a LoRA, with the facts that a file's header has about it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from marble_lightning.checkpoints.content import TO_EXPORT, load_checked
from marble_lightning.policies.lora import Lora
from marble_lightning.policies.lora_average import average, truncate
from marble_lightning.utils.atomic_files import local_path
from marble_lightning.utils.validation import require
from rewards.redaction import redact

Adapter = Literal["ema", "trained"]


class Loaded(NamedTuple):
    """An adapter of a checkpoint: its LoRA, the content of the checkpoint, and entries for a file's header."""

    lora: Lora
    checkpoint: dict[str, Any]
    entries: dict[str, str]


def load_adapter(file: Path, adapter: Adapter, average_with: Sequence[str] = (), rank: int | None = None) -> Loaded:
    """Read an adapter of a checkpoint, as it is, averaged with those of other checkpoints, or at a lower rank.

    Args:
        file: Checkpoint of `fit`.
        adapter: `ema` or `trained`.
        average_with: Further checkpoints.
        rank: Rank of the nearest update that replaces the exact one; None keeps the rank.

    Raises:
        ValueError: A checkpoint is damaged, not from `fit` or of another model, or the rank is out of range.
    """
    checkpoint = load_checked(file, TO_EXPORT, map_location="cpu", weights_only=True)
    lora, entries = adapter_of(checkpoint, adapter, file), about(checkpoint, adapter)
    if average_with:
        others = [local_path("average_with", path) for path in average_with]
        loaded = [load_checked(path, TO_EXPORT, map_location="cpu", weights_only=True) for path in others]
        for path, one in zip(others, loaded, strict=True):
            of_base = [checkpoint["base_model"], one["base_model"]]
            require(
                of_base[0] == of_base[1], f"`average_with` must be of the same base, {of_base[0]}", f"{of_base[1]} in {path}"
            )
        lora = average([lora, *(adapter_of(one, adapter, path) for one, path in zip(loaded, others, strict=True))])
        entries["averaged"] = json.dumps([about(one, adapter) for one in loaded])
    if rank is not None:
        lora, lost = truncate(lora, rank)
        print(f"Rank {rank}: {lost:.1%} of the update's norm is lost.")
    return Loaded(lora, checkpoint, entries)


def adapter_of(checkpoint: dict[str, Any], adapter: Adapter, file: Path) -> Lora:
    """Read one adapter of a checkpoint.

    Raises:
        ValueError: A layer lacks a tensor or has a tensor of another rank.
    """
    rank, alpha = checkpoint["lora"]["rank"], checkpoint["lora"]["alpha"]
    pattern = re.compile(rf"policy\.transformer\.(.+\.lora_[AB])\.{adapter}\.weight")
    matches = {name: pattern.fullmatch(name) for name in checkpoint["state_dict"]}
    tensors = {f"{match[1]}.weight": checkpoint["state_dict"][name] for name, match in matches.items() if match}
    lora = Lora(tensors, rank, alpha, str(file))
    ranks = {tensor.shape[1 if ".lora_B." in name else 0] for name, tensor in tensors.items()}
    if ranks != {rank} or len(tensors) != 2 * len(lora.layers):
        raise ValueError(
            f"`ckpt_path` must hold two tensors of rank {rank} for every layer of the adapter {adapter!r}. "
            f"Found {len(tensors)} of ranks {sorted(ranks)} for {len(lora.layers)} layers in {file}."
        )
    return lora


def about(checkpoint: dict[str, Any], adapter: Adapter) -> dict[str, str]:
    """Entries of the LoRA file's header; a run that was started in Python has no configuration."""
    entries = {
        "version": version("marble-lightning"),
        "adapter": adapter,
        "optimizer_step": str(checkpoint["global_step"]),
        "round": str(checkpoint["epoch"]),
        "rewards": json.dumps(checkpoint["rewards"]),
    }
    entries |= {f"base_{name}": str(value) for name, value in checkpoint["base_model"].items() if value is not None}
    if config := checkpoint["config"]:
        entries["config"] = redact_yaml(config)  # the file may become public, and code may have set `run_config`
    return entries


def redact_yaml(text: str) -> str:
    """A configuration as YAML without its secrets, see `rewards.redaction`."""
    settings = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml's is much faster
    return yaml.safe_dump(redact(settings), sort_keys=False, allow_unicode=True)
