"""JPEG compressibility: a reward without weights, for testing a setup."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.base import Prompt, Reward

UNIT = 500_000
"""Number of bytes that lower the score by 1."""


class JPEGCompressibility(Reward):
    """-(bytes of the image as a JPEG) / 500,000: smooth and empty images score highest.

    Args:
        quality: JPEG quality, 1 to 100.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, section 5.2, with the scale of
    Flow-GRPO.
    """

    identity_fields = (*Reward.identity_fields, "quality")

    def __init__(self, quality: int = 95, batch_size: int = 32) -> None:
        super().__init__(batch_size)
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEGCompressibility: `quality` must be in [1, 100]. Found {quality}. 95 is the usual one.")
        self.quality = quality

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the negative JPEG size of each image, in units of 500,000 bytes."""
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._bytes(image) / UNIT for image in pixels], device=images.device)

    def _bytes(self, image: np.ndarray) -> int:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell()
