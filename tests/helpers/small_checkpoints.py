"""Random checkpoints with a few thousand parameters in the published formats."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def small_pipeline(tokenizer: Any, with_t5: bool = False) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 for 16 x 16 pixels, with SD3.5 Medium's second attention in one of two blocks.

    Args:
        tokenizer: Tokenizer of both CLIP text encoders.
        with_t5: Whether it has the third text encoder.
    """
    torch.manual_seed(0)
    text = clip_text(tokenizer)
    parts = {
        "transformer": SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": small_vae(),
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
    }  # fmt: skip
    third = {"text_encoder_3": None, "tokenizer_3": None}
    if with_t5:
        characters = [(character, -4.0) for character in "\u2581" + string.ascii_letters + string.digits]
        t5_tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *characters], extra_ids=0)
        shape = T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        third = {"text_encoder_3": T5EncoderModel(shape), "tokenizer_3": t5_tokenizer}
    return StableDiffusion3Pipeline(**parts, tokenizer=tokenizer, tokenizer_2=tokenizer, **third)


def small_vae() -> AutoencoderKL:
    """An autoencoder that halves the side of an image, with four channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=0.1,
    )  # fmt: skip


def save_small_clip(folder: Path, tokenizer: Any) -> None:
    """Save a CLIPModel for 16 x 16 pixels with its tokenizer and image processor."""
    vision = {
        "image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=clip_text(tokenizer), vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


def clip_text(tokenizer: Any) -> dict[str, Any]:
    """A CLIP text tower of width 16."""
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "vocab_size": len(tokenizer), "max_position_embeddings": 20, "hidden_size": 16,
        "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 16, **special_tokens,
    }  # fmt: skip
