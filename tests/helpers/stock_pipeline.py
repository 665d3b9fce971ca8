"""The stock diffusers pipeline, and policies to compare it with."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from marble_lightning.policies.base import ADAPTERS
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.utils.seeds import generator
from tests.helpers.small_policies import shake

TEXTS = ["a red circle", "two squares"]


def make(checkpoints: Path, **options) -> SD3Policy:
    settings = {"resolution": 16, "rank": 2, "alpha": 4, "text_length": 4, "dtype": "float32", **options}
    policy = SD3Policy(str(checkpoints / "sd3"), **settings)
    policy.setup(seed=0)
    return policy


def make_three_adapters(checkpoints: Path, **options) -> SD3Policy:
    """A policy with three adapters, all different."""
    policy = make(checkpoints, **options)
    for adapter in ADAPTERS:
        shake(policy, adapter)
    return policy


def save_adapters(policy: SD3Policy, folder: Path) -> Path:
    """Save the adapters of a policy like the checkpoint of an earlier run."""
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items() if ".lora_" in name}
    file = folder / "old.ckpt"
    about = {"base_model": policy.identity, "rewards": ["bright"], "config": None, "epoch": 3, "global_step": 8}
    torch.save({"state_dict": state, "lora": policy.lora, **about}, file)
    return file


def stock(checkpoints: Path, lora: Path | None, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoints / "sd3", dtype=dtype, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def generate_by_pipeline(pipeline: StableDiffusion3Pipeline, kind: str) -> Tensor:
    noise = [generator("export", index) for index in range(len(TEXTS))]
    return pipeline(
        TEXTS, height=16, width=16, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=4, generator=noise,
        output_type=kind,
    ).images  # fmt: skip


def sample_by_policy(policy: SD3Policy, adapter: str) -> Tensor:
    noise = [generator("export", index) for index in range(len(TEXTS))]
    return policy.sample(policy.encode(TEXTS), noise, adapter, steps=4, solver="euler")


def adapter(policy: SD3Policy, name: str) -> dict[str, Tensor]:
    """An adapter's tensors, under the names in LoRA files."""
    state = policy.transformer.state_dict()
    return {key.replace(f".{name}.", "."): tensor for key, tensor in state.items() if f".{name}." in key}


def differ(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()
