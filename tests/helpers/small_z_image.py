"""A random Z-Image with a few thousand parameters, the stock pipeline, and policies to compare it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from marble_lightning.policies.z_image import ZImagePolicy
from marble_lightning.utils.seeds import generator
from tests.helpers.small_checkpoints import small_vae

TEXTS = ["a red circle", "two green squares beside a blue circle and a cross"]
"""Two prompts that the transformer fills up to different numbers of tokens."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def small_z_image() -> ZImagePipeline:
    """Z-Image for 16 x 16 pixels, with two blocks and one that refines each of noise and prompts; tokens are bytes."""
    torch.manual_seed(0)
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=tokens[-2:])
    tokenizer.chat_template = TEMPLATE
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[130, 16, 16],
    )  # fmt: skip
    with torch.no_grad():  # they start at zero
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, small_vae(), Qwen3Model(text), tokenizer, transformer)


def make_z_image(folder: Path, **options: Any) -> ZImagePolicy:
    """A policy that is set up."""
    policy = new_z_image(folder, **options)
    policy.setup(seed=0)
    return policy


def new_z_image(folder: Path, **options: Any) -> ZImagePolicy:
    """A policy that is not set up."""
    settings = {"resolution": 16, "rank": 2, "alpha": 4, "text_length": 96, "dtype": "float32", **options}
    return ZImagePolicy(str(folder), **settings)


def stock_z_image(folder: Path, lora: Path | None = None) -> ZImagePipeline:
    """The stock pipeline, with a LoRA if there is one."""
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def noise() -> list[torch.Generator]:
    """A generator for each of `TEXTS`."""
    return [generator("z-image", index) for index in range(len(TEXTS))]


def generate(pipeline: ZImagePipeline, kind: str = "latent", **options: Any) -> Tensor:
    """Latents or images of `TEXTS` by the stock pipeline."""
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 96, **options}
    return pipeline(list(TEXTS), height=16, width=16, generator=noise(), output_type=kind, **settings).images


def sample(policy: ZImagePolicy, adapter: str | None, **options: Any) -> Tensor:
    """Latents of `TEXTS` by a policy."""
    settings = {"steps": 4, "solver": "euler", **options}
    return policy.sample(policy.encode(TEXTS), noise(), adapter, **settings)
