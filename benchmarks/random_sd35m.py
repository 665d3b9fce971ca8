"""A pipeline of Stable Diffusion 3.5 Medium's architecture with random weights, for timings where no checkpoint is at hand.

Transformer and autoencoder have their full size. The two CLIP text encoders keep their widths but have one layer, and T5 is
left out: a round encodes a prompt once, so they hardly count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer


def networks(layers: int = 24) -> dict[str, Any]:
    """The pipeline's components with weights that matter, transformer and autoencoder, and its scheduler.

    Args:
        layers: Blocks of the transformer, 24 in the original.
    """
    return {
        "transformer": SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(min(13, layers))),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        ),
    }  # fmt: skip


def save_random_sd35m(folder: Path, layers: int = 24, seed: int = 0) -> Path:
    """Save the pipeline in bfloat16 as a diffusers folder, 5 GB at full size; keep what is there.

    Args:
        folder: Where to.
        layers: Blocks of the transformer, 24 in the original; fewer for a trial on a small machine.
        seed: Of the weights.

    Returns:
        The folder.
    """
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(folder / "tokenizer", seed=seed)
    tokenizer.model_max_length = 77
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                num_hidden_layers=1, num_attention_heads=width // 64, max_position_embeddings=77, **marks,
            )
        )
        for width in (768, 1280)
    ]  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        **networks(layers),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder
