"""From the body of a request to images and prompts; what it would expand to is bounded before it does."""

from __future__ import annotations

import json
from reprlib import repr as short_repr
from typing import Any

import torch
from aiohttp import web
from jaxtyping import Float
from torch import Tensor

from rewards import Prompt
from rewards.remote.transport import decode, open_png

MAX_VALUES = 1_000_000
"""Brackets, commas and colons in a body. Each may begin a value, and an empty list of 3 bytes takes 64 of memory."""
MAX_IMAGES = 1024
"""Images in one request, however small."""


class BadRequest(ValueError):
    """A request that is not as the protocol says."""


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The body; unlike `request.read`, the request does not keep it.

    Raises:
        HTTPRequestEntityTooLarge: if it is larger.
        HTTPUnsupportedMediaType: if it is compressed.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise web.HTTPUnsupportedMediaType(text="The body must not be compressed: PNGs already are")
    body = bytearray()
    if (request.content_length or 0) > max_bytes:
        raise web.HTTPRequestEntityTooLarge(max_bytes, request.content_length or 0)
    async for part in request.content.iter_any():
        body += part
        if len(body) > max_bytes:
            raise web.HTTPRequestEntityTooLarge(max_bytes, len(body))
    return bytes(body)


def parse(body: bytes, max_pixels: int) -> tuple[Float[Tensor, "b 3 h w"], list[Prompt]]:
    """The images and prompts of a request.

    Args:
        body: JSON.
        max_pixels: Most pixels of all images together, counted from their headers before any is decoded.

    Raises:
        BadRequest: if the body is not as the protocol says.
    """
    asked = load_json(body)
    images, prompts = (asked.get(name) if isinstance(asked, dict) else None for name in ("images", "prompts"))
    if not isinstance(images, list) or not isinstance(prompts, list) or not images or len(images) != len(prompts):
        found = [f"{len(part)}" if isinstance(part, list) else type(part).__name__ for part in (images, prompts)]
        raise BadRequest(
            "`images` and `prompts` must be lists of one length, not empty. "
            f"Found {found[0]} and {found[1]}. Send one prompt an image."
        )
    if len(images) > MAX_IMAGES:
        raise BadRequest(f"`images` must hold at most {MAX_IMAGES}. Found {len(images)}. Send fewer at once.")
    wanted = [to_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    opened = [named(index, open_png, image) for index, image in enumerate(images)]
    sizes = sorted({image.size[::-1] for image in opened})
    if len(sizes) > 1:
        raise BadRequest(f"`images` must be of one size. Found {sizes}. Send a request for each size.")
    height, width = sizes[0]
    if len(opened) * height * width > max_pixels:
        raise BadRequest(
            f"`images` must have at most {max_pixels} pixels together. Found {len(opened)} of {width} x {height}. "
            "Send fewer or smaller ones, or raise --max_pixels."
        )
    pixels = torch.stack([named(index, decode, image) for index, image in enumerate(opened)])
    return pixels.float().div_(255), wanted


def load_json(body: bytes) -> Any:
    """What a body of bounded content says.

    Raises:
        BadRequest: if it is no JSON, or has too many values or too deep ones.
    """
    if (values := sum(map(body.count, (b"[", b"{", b",", b":")))) > MAX_VALUES:
        raise BadRequest(f"the body must hold at most {MAX_VALUES} values. Found about {values}. Send fewer images.")
    try:
        return json.loads(body)
    except ValueError as error:  # covers bytes that are no text
        raise BadRequest(f"the body must be JSON. Found something else: {error}.") from error
    except RecursionError as error:
        raise BadRequest("the body must be JSON of a few levels. Found too many. Keep metadata flat.") from error


def named(index: int, read: Any, image: Any) -> Any:
    """`read(image)`, with the image's place in an error.

    Raises:
        BadRequest: if it cannot be read.
    """
    try:
        return read(image)
    except ValueError as error:
        raise BadRequest(f"images[{index}]: {error}") from error


def to_prompt(index: int, found: Any) -> Prompt:
    """A prompt of a request.

    Raises:
        BadRequest: if it has no text or source, or its metadata is no mapping.
    """
    expected = {"text": str, "source": str, "metadata": dict}
    prompt = {"metadata": {}, **found} if isinstance(found, dict) else {}
    if set(prompt) != set(expected) or not all(isinstance(prompt[name], kind) for name, kind in expected.items()):
        raise BadRequest(
            f'prompts[{index}] must be {{"text": string, "source": string, "metadata": object}}. Found {short_repr(found)}.'
        )
    try:
        return Prompt(**prompt)
    except ValueError as error:  # too deep metadata
        raise BadRequest(f"prompts[{index}]: {error}") from error
