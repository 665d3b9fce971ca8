"""What rewards behind HTTP and their server share: images as text, short quotes for errors."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from rewards.redaction import strip_secrets


def eight_bit(images: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pixels in [0, 1] as bytes on the CPU, in one copy from the device."""
    return (images * 255).round().byte().cpu()


def encode_png(pixels: UInt8[Tensor, "3 h w"], side: int | None = None) -> str:
    """An image as PNG, lossless, in base64.

    Args:
        pixels: 8-bit, on the CPU.
        side: pixels of the square it is resized to before, bicubic. None: as it is.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # 1: several times as fast as the default, hardly larger
    return base64.b64encode(buffer.getvalue()).decode()


def open_png(text: Any) -> Image.Image:
    """The image of `encode_png`'s text, of which only the header is read: its `size` is known, no pixel is decoded.

    Whoever decodes the images of others looks at it first.

    Raises:
        ValueError: if `text` is not base64 of an 8-bit RGB PNG.
    """
    if not isinstance(text, str):
        raise ValueError(f"an image must be a base64 string. Found {type(text).__name__}. Encode an 8-bit RGB PNG.")
    with _unreadable():
        # not `Image.open`, which warns above a number of pixels of its own
        image = PngImageFile(BytesIO(base64.b64decode(text, validate=True)))
    if image.mode != "RGB":
        raise ValueError(f"an image must be an RGB PNG. Found mode {image.mode}. Convert it to RGB first.")
    return image


def decode(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """The pixels of an image that was opened.

    >>> red = torch.zeros(3, 1, 2, dtype=torch.uint8)
    >>> red[0] = 255
    >>> decode(open_png(encode_png(red))).tolist()
    [[[255, 255]], [[0, 0]], [[0, 0]]]

    Raises:
        ValueError: if they are damaged.
    """
    with _unreadable():
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    # SyntaxError and EOFError are Pillow's for broken chunks.
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"an image must be a base64 PNG. Found one that cannot be read: {quote(error)}. Encode an 8-bit RGB PNG."
        ) from error


def quote(said: Any, limit: int = 300) -> str:
    """What somebody said, on one line, cut and without secrets in URLs, for an error message."""
    text = " ".join(strip_secrets(str(said)[: 20 * limit]).split()).rstrip(".")
    return text if len(text) <= limit else text[:limit] + "..."
