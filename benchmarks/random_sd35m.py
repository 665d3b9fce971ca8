"""A pipeline with Stable Diffusion 3.5 Medium's architecture and random weights, for benchmarks without a checkpoint.

`python -m benchmarks.random_sd35m FOLDER` saves it in diffusers format, as a path for `fit`: 5 GB, or 16 GB with
`--encoders`. Transformer and autoencoder have their full size. Without `--encoders` the two CLIP text encoders have their
full width but one layer, and T5 is left out: a round encodes a prompt once, so they hardly affect timings. The
vocabulary is the tiny world's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from marble_lightning.tinyworld import PROMPTS
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer

WHOLE: dict[str, Any] = {"clip_layers": (12, 32), "t5_layers": 24}
"""Layers of the text encoders in the original model."""

TWO_ROUNDS: dict[str, object] = {
    "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto", "trainer.max_epochs": 2,
    "trainer.limit_val_batches": 0, "trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": False,
    "data.folder": PROMPTS, "data.prompts_per_round": 3, "model.rewards": "{jpeg: JPEGCompressibility}",
    "model.metrics": "{}", "balancer.refresh_every": 2, "memory.check": "off",
}  # fmt: skip
"""Options of `fit`, after configs/sd35m.yaml: two rounds of three prompts on one device, a refresh in one of them."""


def two_rounds(configs: Sequence[str], path: Path, folder: Path, more: Mapping[str, object]) -> list[str]:
    """Options of `fit` for `TWO_ROUNDS` that writes to a folder.

    Args:
        configs: Names of files in configs/.
        path: Folder of the pipeline.
        folder: Folder of the run.
        more: Further options, which replace those of `TWO_ROUNDS`.
    """
    files = [part for name in configs for part in ("-c", str(Path(__file__).parents[1] / f"configs/{name}.yaml"))]
    places = {"model.policy.path": path, "trainer.logger.save_dir": folder, "trainer.default_root_dir": folder}
    options = TWO_ROUNDS | dict(more) | places
    return [*files, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def networks(layers: int = 24) -> dict[str, Any]:
    """Build the pipeline's transformer, autoencoder and scheduler.

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


def random_sd35m(
    tokenizer: Any, layers: int = 24, clip_layers: tuple[int, int] = (1, 1), t5_layers: int = 0
) -> StableDiffusion3Pipeline:
    """Build the pipeline in bfloat16, on torch's default device.

    Args:
        tokenizer: CLIP tokenizer, for all text encoders.
        layers: Blocks of the transformer, 24 in the original; fewer for a test on a small machine.
        clip_layers: Layers of the two CLIP text encoders, 12 and 32 in the original.
        t5_layers: Layers of T5, 24 in the original; 0 leaves it out.
    """
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    large = None
    if t5_layers:
        large = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer), d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=t5_layers,
                feed_forward_proj="gated-gelu",
            )
        ).to(torch.bfloat16)  # fmt: skip
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                num_hidden_layers=depth, num_attention_heads=width // 64, max_position_embeddings=77, **special_tokens,
            )
        ).to(torch.bfloat16)
        for width, depth in zip((768, 1280), clip_layers, strict=True)
    ]  # fmt: skip
    parts = networks(layers)
    for part in (parts["transformer"], parts["vae"]):
        part.to(torch.bfloat16)
    return StableDiffusion3Pipeline(
        **parts, text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=large, tokenizer_3=tokenizer if large else None,
    )  # fmt: skip


def save_random_sd35m(folder: Path, layers: int = 24, seed: int = 0, **encoders: Any) -> Path:
    """Save the pipeline as a diffusers folder, unless the folder holds one already.

    Args:
        folder: Folder of the pipeline.
        layers: Blocks of the transformer.
        seed: Seed of the weights.
        encoders: `clip_layers` and `t5_layers` of `random_sd35m`; `WHOLE` for the original's.

    Returns:
        The folder.
    """
    if not (folder / "model_index.json").exists():
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(folder / "tokenizer", seed=seed)
        tokenizer.model_max_length = 77
        # a CPU takes minutes to draw eight billion weights
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            random_sd35m(tokenizer, layers, **encoders).save_pretrained(folder)
    return folder


def main() -> None:
    """Save a pipeline and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoders", action="store_true", help="text encoders at full size, including T5")
    options = parser.parse_args()
    print(save_random_sd35m(options.folder, **(WHOLE if options.encoders else {})))


if __name__ == "__main__":
    main()
