"""Export of a checkpoint's adapter as a LoRA file that diffusers and ComfyUI load."""

from __future__ import annotations

import json
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from marble_lightning.checkpoints.content import TO_EXPORT, load_checked
from marble_lightning.policies.lora import Lora
from marble_lightning.policies.lora_average import average, truncate
from marble_lightning.policies.lora_files import FILE, write_lora
from marble_lightning.utils.atomic_files import check_folder, local_path, remove_unfinished
from marble_lightning.utils.validation import require
from rewards.redaction import redact

Adapter = Literal["ema", "trained"]


def export(
    ckpt_path: str | Path,
    to: str | Path,
    adapter: Adapter | Literal["policy"] = "ema",
    overwrite: bool = False,
    average_with: list[str] | None = None,
    rank: int | None = None,
) -> Path:
    """Write a checkpoint's adapter as a LoRA that diffusers and ComfyUI load; neither base model nor GPU is needed.

    The header of the file also names the base model, the rewards, the run's config and the round.

    Args:
        ckpt_path: Checkpoint that `fit` wrote, e.g. checkpoints/last.ckpt in a run's folder.
        to: Folder for pytorch_lora_weights.safetensors; created if it does not exist.
        adapter: `ema`, the averaged adapter, which is evaluated on held-out prompts, or `trained`, its source
            (`policy`, its old name, is accepted for one release).
        overwrite: Whether an existing file of that name in `to` is replaced.
        average_with: Further checkpoints; the LoRA is the exact mean of the updates of all, with the sum of their ranks.
        rank: Rank of the LoRA, if it is to be lower: the nearest update of this rank. Null keeps it.

    Raises:
        ValueError: A checkpoint is damaged, not from `fit` or of another model, the rank is out of range, or the file exists
            already.
    """
    if adapter == "policy":
        warnings.warn("The adapter `policy` is now `trained`. Use that name.", FutureWarning, stacklevel=2)
        adapter = "trained"
    file, folder = local_path("ckpt_path", ckpt_path), Path(to).expanduser()
    check_folder("to", folder)
    remove_unfinished([folder])
    if (folder / FILE).exists() and not overwrite:
        raise ValueError(
            f"`to` must be a folder without {FILE}. Found one in {folder}; choose another, or add --overwrite true."
        )
    checkpoint = load_checked(file, TO_EXPORT, map_location="cpu", weights_only=True)
    lora, entries = adapter_of(checkpoint, adapter, file), about(checkpoint, adapter)
    if average_with:
        others = [local_path("average_with", path) for path in average_with]
        loaded = [load_checked(path, TO_EXPORT, map_location="cpu", weights_only=True) for path in others]
        for path, one in zip(others, loaded, strict=True):
            of_base = [checkpoint.get("base_model", {}), one.get("base_model", {})]
            require(
                of_base[0] == of_base[1], f"`average_with` must be of the same base, {of_base[0]}", f"{of_base[1]} in {path}"
            )
        lora = average([lora, *(adapter_of(one, adapter, path) for one, path in zip(loaded, others, strict=True))])
        entries["averaged"] = json.dumps([about(one, adapter) for one in loaded])
    if rank is not None:
        lora, lost = truncate(lora, rank)
        print(f"Rank {rank}: {lost:.1%} of the update's norm is lost.")
    written = write_lora(lora, folder, checkpoint["lora"]["targets"], entries)
    print(
        f"{written}\n"
        f"diffusers:  pipeline.load_lora_weights({str(folder)!r})\n"
        "ComfyUI:    copy it to models/loras under a unique name, for the node LoraLoaderModelOnly\n"
        f"start here: marble-lightning fit ... --model.policy.init_lora {folder} "
        f"--model.policy.rank {lora.rank} --model.policy.alpha {lora.alpha:g}"
    )
    return written


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
    """Entries of the LoRA file's header, as far as the checkpoint has them."""
    entries = {
        "version": version("marble-lightning"),
        "adapter": adapter,
        "optimizer_step": str(checkpoint["global_step"]),
        "round": str(checkpoint["epoch"]),
    }
    base = checkpoint.get("base_model", {})
    entries |= {f"base_{name}": str(value) for name, value in base.items() if value is not None}
    if "rewards" in checkpoint:
        entries["rewards"] = json.dumps(checkpoint["rewards"])
    if config := checkpoint.get("config"):
        entries["config"] = redact_yaml(config)  # older checkpoints may contain secrets
    return entries


def redact_yaml(text: str) -> str:
    """A configuration as YAML without its secrets, see `rewards.redaction`."""
    return yaml.safe_dump(redact(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
