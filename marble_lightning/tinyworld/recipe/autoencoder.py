"""The autoencoder: 64 x 64 pixels to 8 x 8 latents of 16 channels and back, SD3's own factor and channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from tqdm import tqdm

from marble_lightning.tinyworld.recipe.images import TrainingImages, to_unit
from marble_lightning.tinyworld.recipe.stage import Stage, run
from marble_lightning.tinyworld.scenes import SIZE

CHANNELS = 16
"""Channels of the latents."""


class AutoencoderStage(Stage):
    """Squared error plus absolute error plus a small Kullback-Leibler term, as in the autoencoders of latent diffusion."""

    def __init__(self, model: AutoencoderKL, images: Tensor, steps: int) -> None:
        super().__init__(model, len(images), steps, batch_size=8, lr=2e-3, decay=0.998)
        self.images = images

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        images = 2 * to_unit(self.images[indices.cpu()]) - 1
        posterior = self.model.encode(images).latent_dist
        error = self.model.decode(posterior.sample()).sample - images
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean() / images[0].numel()
        self.log("loss", loss, prog_bar=True)
        self.log("squared", error.square().mean())
        return loss


def new_autoencoder() -> AutoencoderKL:
    """Build the autoencoder. With default weights, or several groups in its norms, it learns far more slowly."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 48),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):  # each starts as the identity
            nn.init.zeros_(module.conv2.weight)
    return model


def train_autoencoder(training_images: TrainingImages, work: Path, steps: int) -> AutoencoderKL:
    """Train the autoencoder; its `scaling_factor` and `shift_factor` give latents mean 0 and standard deviation 1."""
    torch.manual_seed(1)
    model = run(AutoencoderStage(new_autoencoder(), training_images.images, steps), work)
    latents = raw_latents(model, training_images.images[:4096])
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return model


@torch.no_grad()
def raw_latents(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return latent means before shift and scale, (N, 16, 8, 8)."""
    chunks = tqdm(images.split(256), desc="encoding")
    return torch.cat([model.encode(2 * to_unit(chunk) - 1).latent_dist.mean for chunk in chunks])


def latents_of(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return latents as input of the transformer, (N, 16, 8, 8)."""
    return (raw_latents(model, images) - model.config.shift_factor) * model.config.scaling_factor
