"""A base model's transformer with an adapter merged into its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from marble_lightning.policies.lora import Lora
from marble_lightning.policies.pipeline_kinds import kind_of
from marble_lightning.policies.pipeline_loading import load_part
from marble_lightning.utils.atomic_files import scratch_for
from rewards.files import resolve_path

ADAPTER = "merged"
FILES = (CONFIG_NAME, f"{Path(SAFETENSORS_WEIGHTS_NAME).stem}*")
"""Patterns of the files of a transformer; large ones have several files of weights."""


def write_fused(lora: Lora, base: str, identity: dict[str, Any], folder: Path) -> list[Path]:
    """Write the base's transformer with a LoRA merged into its weights, in the precision that the run had for the base.

    Each sum is computed in float32 and rounded once.

    Args:
        lora: The LoRA.
        base: Folder or hub id of the base.
        identity: The run's facts of the base, of which `dtype`, `revision` and `pipeline` are used.
        folder: Folder that `from_pretrained` of the transformer's class then loads. Earlier ones are replaced.

    Returns:
        The files.

    Raises:
        ValueError: The base cannot be loaded, or is another model than the LoRA's.
    """
    dtype, revision = getattr(torch, identity.get("dtype", "float32")), identity.get("revision")
    path = resolve_path(base)
    transformer: Any = load_part(kind_of(identity).transformer_class, "transformer", path, dtype, revision, setting="base")
    lost = merge(lora, transformer, base)
    print(f"Merged in {str(dtype)[6:]}: {lost:.1%} of the update's norm is lost by rounding.")
    with scratch_for(folder / "transformer") as scratch:
        transformer.save_pretrained(scratch)
        for file in [file for pattern in FILES for file in folder.glob(pattern)]:
            file.unlink()
        names = sorted(file.name for file in scratch.iterdir())
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):  # nothing loads without the last one
            os.replace(scratch / name, folder / name)
    return [folder / name for name in names]


@torch.no_grad()
def merge(lora: Lora, transformer: Any, origin: str) -> float:
    """Merge a LoRA into a transformer's weights.

    Args:
        lora: The LoRA.
        transformer: The transformer, without adapters.
        origin: Where it comes from, for error messages.

    Returns:
        The norm of what rounding loses divided by the norm of the update.

    Raises:
        ValueError: The LoRA is for other layers or sizes.
    """
    modules = dict(transformer.named_modules())
    for layer in lora.layers:
        expected = (len(lora.tensors[f"{layer}.lora_B.weight"]), lora.tensors[f"{layer}.lora_A.weight"].shape[1])
        actual = tuple(modules[layer].weight.shape) if layer in modules else None
        if actual != expected:
            raise ValueError(
                f"`base` must be the model that the adapter was trained on, with {layer} of size {expected}. Found "
                f"{actual or 'no such layer'} in {origin}; give that one."
            )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.layers)
    transformer.add_adapter(config, ADAPTER)
    error = whole = 0.0
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for matrices in (module.lora_A, module.lora_B):
                matrices[ADAPTER].float()
    lora.copy_to(transformer, ADAPTER)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            weight, update = module.get_base_layer().weight, module.get_delta_weight(ADAPTER)
            before = weight.to(torch.float32, copy=True)
            module.merge(adapter_names=[ADAPTER])
            error += float((weight.float() - before - update).square().sum())
            whole += float(update.square().sum())
    transformer.unload_lora()
    return (error / whole) ** 0.5 if whole else 0.0
