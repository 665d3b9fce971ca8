"""What rewards behind HTTP share: pictures as text, a bounded number of requests in flight, short quotes for errors."""

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def decode_png(text: Any) -> Float[Tensor, "3 h w"]:
    """The pixels of `encode_png`'s text, in [0, 1].

    >>> red = torch.zeros(3, 1, 2, dtype=torch.uint8)
    >>> red[0] = 255
    >>> decode_png(encode_png(red)).tolist()
    [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]

    Raises:
        ValueError: if `text` is not base64 of an 8-bit RGB PNG.
    """
    if not isinstance(text, str):
        raise ValueError(f"an image must be a base64 string. Found {type(text).__name__}. Encode an 8-bit RGB PNG.")
    try:
        image = Image.open(BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        pixels = np.array(image)
    # SyntaxError and EOFError are Pillow's for broken chunks.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"an image must be a base64 PNG. Found one that cannot be read: {quote(error)}. Encode an 8-bit RGB PNG."
        ) from error
    if image.mode != "RGB":
        raise ValueError(f"an image must be an RGB PNG. Found mode {image.mode}. Convert it to RGB first.")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`[function(item) for item in items]` on at most `threads` threads; after an error nothing new begins."""
    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(items)))) as pool:
        return list(pool.map(function, items))


def quote(said: Any, limit: int = 300) -> str:
    """What somebody said, on one line and cut, for an error message."""
    text = " ".join(str(said).split()).rstrip(".")
    return text if len(text) <= limit else text[:limit] + "..."


def check_connection(owner: str, *, url: str, url_name: str, concurrency: int, timeout: float, retries: int) -> str:
    """The URL without a slash at its end, after a look at what all clients take.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{owner}: `{url_name}` must begin with http:// or https://. Found '{url}'. Give the scheme.")
    if concurrency < 1:
        raise ValueError(f"{owner}: `concurrency` must be >= 1. Found {concurrency}. It counts requests in flight.")
    if not timeout > 0:
        raise ValueError(f"{owner}: `timeout` must be > 0 seconds. Found {timeout}. Allow for the slowest answer.")
    if retries < 0:
        raise ValueError(f"{owner}: `retries` must be >= 0. Found {retries}. 0 gives up at the first failure.")
    return url.rstrip("/")
