"""The autoencoder: 32 x 32 pixels to 16 x 16 latents of 4 channels and back."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from marble_lightning.tinyworld.recipe.images import TrainingImages, to_unit
from marble_lightning.tinyworld.recipe.stage import Stage, run


class AutoencoderStage(Stage):
    """Squared error plus absolute error plus a small Kullback-Leibler term, as in the autoencoders of latent diffusion."""

    def __init__(self, model: AutoencoderKL, images: Tensor, steps: int) -> None:
        super().__init__(model, len(images), steps, batch_size=32, lr=2e-3, decay=0.99)
        self.images = images

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        images = 2 * to_unit(self.images[indices.cpu()]) - 1
        posterior = self.model.encode(images).latent_dist
        error = self.model.decode(posterior.sample()).sample - images
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean() / images[0].numel()
        self.log("loss", loss, prog_bar=True)
        return loss


def train_autoencoder(training_images: TrainingImages, work: Path, steps: int) -> AutoencoderKL:
    """Train the autoencoder; its `scaling_factor` and `shift_factor` give latents mean 0 and standard deviation 1."""
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    model = run(AutoencoderStage(model, training_images.images, steps), work)
    latents = raw_latents(model, training_images.images[:4096])
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return model


@torch.no_grad()
def raw_latents(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return latent means before shift and scale, (N, 4, 16, 16)."""
    chunks = tqdm(images.split(256), desc="encoding")
    return torch.cat([model.encode(2 * to_unit(chunk) - 1).latent_dist.mean for chunk in chunks])


def latents_of(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return latents as input of the transformer, (N, 4, 16, 16)."""
    return (raw_latents(model, images) - model.config.shift_factor) * model.config.scaling_factor
