"""Small checkpoints in the real formats, made once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sd3`, a random StableDiffusion3Pipeline for 16 x 16 pixels, and `clip`, a random CLIPModel."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(folder / "tokenizer", seed=0)
    torch.manual_seed(0)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 20, "hidden_size": 16,
        "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 16, **marks,
    }  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
            use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=0.1,
        ),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "sd3")
    vision = {
        "image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when it is given arguments in Python while the program has some of its own."""
    monkeypatch.setattr("sys.argv", ["marble-lightning"])


@pytest.fixture
def small(checkpoints: Path, tmp_path: Path) -> list[str]:
    """Command-line options that run configs/tiny.yaml on the random checkpoints, small, writing to `tmp_path`."""
    root = Path(__file__).parent.parent
    clip = str(checkpoints / "clip")
    options = {
        "trainer.logger.save_dir": tmp_path,
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 2,
        "trainer.enable_progress_bar": False,
        "data.folder": root / "marble_lightning/tinyworld/prompts",
        "data.prompts_per_round": 6,
        "data.images_per_prompt": 4,
        "data.held_out_per_source": 2,
        "data.held_out_images": 1,
        "model.policy.path": checkpoints / "sd3",
        "model.policy.resolution": 16,
        "model.policy.rank": 2,
        "model.rewards.pickscore.path": clip,
        "model.rewards.hpsv2.path": clip,
        "model.rewards.clipscore.path": clip,
        "model.sampling.steps": 4,
        "model.sampling.times_per_image": 2,
        "model.sampling.batch_size": 12,
        "model.evaluation.steps": 2,
        "model.micro_batch_size": 8,
        "model.optimizer_steps_per_round": 1,
        "memory.check": "off",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-c", str(root / "configs/tiny.yaml"), *flags]
