"""JPEG compressibility: a reward without weights, to try a set-up with."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.base import Prompt, Reward

UNIT = 500_000
"""Bytes that cost one point."""


class JPEGCompressibility(Reward):
    """-(bytes of the image as a JPEG) / 500,000: smooth and empty images win.

    Source: Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, section 5.2, at that scale in
    Flow-GRPO.

    Args:
        quality: of the JPEG, 1 to 100.
        batch_size: images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    identity_fields = (*Reward.identity_fields, "quality")

    def __init__(self, quality: int = 95, batch_size: int = 32) -> None:
        super().__init__(batch_size)
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEGCompressibility: `quality` must be in [1, 100]. Found {quality}. 95 is the usual one.")
        self.quality = quality

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """The size of each image, negative."""
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._bytes(picture) / UNIT for picture in pixels], device=images.device)

    def _bytes(self, picture: np.ndarray) -> int:
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell()
