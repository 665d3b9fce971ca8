"""Functions shared by remote rewards and their server: encoded images, short quotes for error messages."""

import base64
import struct
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

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG; its chunks follow."""
PLAIN_CHUNKS = frozenset(b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB sBIT bKGD pHYs tIME eXIf".split())
"""Chunks of which Pillow keeps at most as much memory as the file has bytes. Compressed texts and colour profiles expand a
thousandfold, already when a PNG is opened."""


def eight_bit(images: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Convert pixels in [0, 1] to bytes on the CPU, in one copy from the device."""
    return (images * 255).round().byte().cpu()


def encode_png(pixels: UInt8[Tensor, "3 h w"], side: int | None = None) -> str:
    """Encode an image as a lossless PNG in base64.

    Args:
        pixels: 8-bit pixels on the CPU.
        side: Side in pixels of the square to which the image is resized first (bicubic). None: no resizing.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # several times faster than the default, files hardly larger
    return base64.b64encode(buffer.getvalue()).decode()


def open_png(text: Any) -> Image.Image:
    """Open a text of `encode_png`; only the header is read, so `size` is known but no pixel is decoded.

    Check `size` before decoding images from untrusted clients.

    Raises:
        ValueError: if `text` is not base64 of an 8-bit RGB PNG, or the PNG has a chunk that is not among `PLAIN_CHUNKS`.
    """
    if not isinstance(text, str):
        raise ValueError(f"an image must be a base64 string. Found {type(text).__name__}. Encode an 8-bit RGB PNG.")
    with _unreadable():
        png = base64.b64decode(text, validate=True)
    if other := next((name for name in chunk_names(png) if name not in PLAIN_CHUNKS), None):
        raise ValueError(
            "an image must be a PNG without texts and colour profile. "
            f"Found a chunk {other.decode('latin-1')!a}. Save only its pixels."
        )
    with _unreadable():
        image = PngImageFile(BytesIO(png))  # not `Image.open`, because it warns above its own limit of pixels
    if image.mode != "RGB":
        raise ValueError(f"an image must be an RGB PNG. Found mode {image.mode}. Convert it to RGB first.")
    return image


def chunk_names(png: bytes) -> Iterator[bytes]:
    """Yield the names of a PNG's chunks until its end or damage, and none of another file.

    >>> list(chunk_names(base64.b64decode(encode_png(torch.zeros(3, 1, 2, dtype=torch.uint8)))))
    [b'IHDR', b'IDAT', b'IEND']
    """
    start, name = len(SIGNATURE) if png.startswith(SIGNATURE) else len(png), b""
    while name != b"IEND" and start + 8 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        yield name
        start += 12 + length  # with length, name and checksum


def decode(text: Any) -> UInt8[Tensor, "3 h w"]:
    """Decode the pixels of a text of `encode_png`.

    >>> red = torch.zeros(3, 1, 2, dtype=torch.uint8)
    >>> red[0] = 255
    >>> decode(encode_png(red)).tolist()
    [[[255, 255]], [[0, 0]], [[0, 0]]]

    Raises:
        ValueError: as `open_png`, or if the image data is damaged.
    """
    image = open_png(text)
    with _unreadable():
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    # Pillow raises SyntaxError and EOFError for broken chunks.
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"an image must be a base64 PNG. Found one that cannot be read: {quote(error)}. Encode an 8-bit RGB PNG."
        ) from error


def quote(value: Any, limit: int = 300) -> str:
    """Quote a value in an error message: on one line, cut, without secrets in URLs."""
    text = " ".join(strip_secrets(str(value)[: 20 * limit]).split()).rstrip(".")
    return text if len(text) <= limit else text[:limit] + "..."
