"""Encoding and decoding of images for HTTP."""

from __future__ import annotations

import base64
import random
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.remote.transport import decode, eight_bit, encode_png


def random_images(count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    """Return random images with 8-bit pixel values."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * 255).round() / 255


def test_damaged_images_are_decoded_or_raise_value_error() -> None:
    """A thousand PNGs, each with a few wrong base64 letters."""
    source, text = random.Random(0), encode_png(eight_bit(random_images(1, 8, 8))[0])
    refused = read = 0
    for _ in range(1000):
        letters = list(text)
        for _ in range(source.randint(1, 4)):
            letters[source.randrange(len(letters))] = source.choice(text)
        try:
            decode("".join(letters))
        except ValueError as error:
            refused += "an image must be" in str(error)
        else:
            read += 1
    assert read + refused == 1000
    assert refused > 500


def test_encoding_an_8_bit_image_is_lossless() -> None:
    image = random_images(1)
    assert torch.equal(decode(encode_png(eight_bit(image)[0])), eight_bit(image)[0])


def test_pixels_are_rounded_not_truncated() -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 254.4, 254.6, 255.0]).div(255).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert eight_bit(levels)[0, 0, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(
    "options",
    [{}, {"optimize": True}, {"dpi": (300, 300)}, {"exif": Image.Exif()}, {"transparency": (0, 0, 0)}],
    ids=lambda options: next(iter(options), "default"),
)
def test_images_saved_by_pillow_are_decoded(options: dict[str, Any]) -> None:
    pixels, file = eight_bit(random_images(1))[0], BytesIO()
    Image.fromarray(np.asarray(pixels.permute(1, 2, 0))).save(file, "PNG", **options)
    assert torch.equal(decode(base64.b64encode(file.getvalue()).decode()), pixels)
