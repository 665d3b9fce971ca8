"""The base model: an SD3 transformer and its two CLIP text encoders, trained together by flow matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from marble_lightning.tinyworld.recipe.autoencoder import CHANNELS, latents_of
from marble_lightning.tinyworld.recipe.images import TrainingImages, load_or_make
from marble_lightning.tinyworld.recipe.muon import Muon
from marble_lightning.tinyworld.recipe.stage import Stage, run
from marble_lightning.tinyworld.scenes import CELL, SIZE

EMPTY_TOKENS = 1
"""Number of zero tokens in place of T5's, equal to the pipeline's `max_sequence_length`."""
TEXT_WIDTH = 64


class Base(nn.Module):
    """Transformer and text encoders, called as in the stock pipeline."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=SIZE // CELL,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=5,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=96,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=8,  # one unit per patch; with SD3's 384 the positions of 8 x 8 patches would hardly differ
            qk_norm="rms_norm",
        )
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModelWithProjection(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Predict the velocity of noisy latents (B, 16, 8, 8) at noise levels (B,) for token ids (B, T)."""
        encoded = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        hidden = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        hidden = torch.cat([hidden, hidden.new_zeros(len(hidden), EMPTY_TOKENS, hidden.shape[-1])], dim=1)
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=hidden,
            pooled_projections=torch.cat([output.text_embeds for output in encoded], dim=-1),
            timestep=1000 * sigma,
        ).sample


class BaseStage(Stage):
    """Flow matching: the velocity is noise - latents, noise levels are logit-normal, one caption in twelve is dropped."""

    def __init__(self, model: Base, latents: Tensor, tokens: Tensor, **options: Any) -> None:
        super().__init__(model, len(latents), **options)
        self.latents, self.tokens, self.empty = latents, tokens[:-1], tokens[-1]

    def new_optimizer(self) -> torch.optim.Optimizer:
        return Muon.of_layers(self.model, "transformer_blocks", self.lr)

    def on_fit_start(self) -> None:
        self.model.transformer.compile()  # compilation takes less time than it saves over thousands of steps

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(104729 * self.global_step + 2)
        latents = self.latents[indices]
        noise = torch.randn(latents.shape, generator=generator)
        sigma = (0.3 + 1.2 * torch.randn(len(latents), generator=generator)).sigmoid()
        dropped = torch.rand(len(latents), generator=generator) < 1 / 12
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[indices])
        mix = sigma[:, None, None, None]
        velocity = self.model((1 - mix) * latents + mix * noise, sigma, tokens)
        loss = (velocity - (noise - latents)).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss


def train_base(
    training_images: TrainingImages, tokenizer: CLIPTokenizer, vae: AutoencoderKL, work: Path, steps: int
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoders on images with captions, and return the whole pipeline.

    Args:
        training_images: Images with captions.
        tokenizer: Tokenizer of the captions.
        vae: The trained autoencoder.
        work: Folder of the checkpoints.
        steps: Optimizer steps.
    """
    torch.manual_seed(2)
    captions = [*training_images.captions, ""]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = load_or_make(work / "latents.pt", lambda: latents_of(vae, training_images.images))
    stage = BaseStage(Base(tokenizer), latents, tokens, steps=steps, batch_size=32, lr=3e-3, decay=0.999)
    trained = run(stage, work / "base")
    return StableDiffusion3Pipeline(
        transformer=trained.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=trained.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=trained.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
