"""Parse the body of a request into images and prompts, with limits checked before memory is allocated."""

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
"""Maximum number of brackets, braces, commas and colons in a body. Each may start a value, and an empty list of 3 bytes
takes 64 bytes of memory."""
MAX_IMAGES = 1024
"""Maximum number of images in one request, regardless of size."""


class BadRequest(ValueError):
    """A request that violates the protocol."""


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """Read the body; unlike `request.read`, this does not store it in the request.

    Raises:
        HTTPRequestEntityTooLarge: if the body is larger than `max_bytes`.
        HTTPUnsupportedMediaType: if the body is compressed.
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
    """Parse the images and prompts of a request.

    Args:
        body: JSON text.
        max_pixels: Maximum number of pixels of all images together, counted from their headers before any is decoded.

    Raises:
        BadRequest: if the body violates the protocol.
    """
    content = load_json(body)
    images, prompts = (content.get(name) if isinstance(content, dict) else None for name in ("images", "prompts"))
    if not isinstance(images, list) or not isinstance(prompts, list) or not images or len(images) != len(prompts):
        lengths = [f"{len(part)}" if isinstance(part, list) else type(part).__name__ for part in (images, prompts)]
        raise BadRequest(
            "`images` and `prompts` must be lists of the same length, not empty. "
            f"Found {lengths[0]} and {lengths[1]}. Send one prompt per image."
        )
    if len(images) > MAX_IMAGES:
        raise BadRequest(f"`images` must hold at most {MAX_IMAGES}. Found {len(images)}. Send fewer images per request.")
    parsed_prompts = [to_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    # One image is open at a time, because Pillow copies the file and keeps what its chunks hold.
    sizes = sorted({with_index(index, open_png, image).size[::-1] for index, image in enumerate(images)})
    if len(sizes) > 1:
        raise BadRequest(f"`images` must be of the same size. Found {sizes}. Send a request for each size.")
    height, width = sizes[0]
    if len(images) * height * width > max_pixels:
        raise BadRequest(
            f"`images` must have at most {max_pixels} pixels together. Found {len(images)} of {width} x {height}. "
            "Send fewer or smaller ones, or raise --max_pixels."
        )
    pixels = torch.stack([with_index(index, decode, image) for index, image in enumerate(images)])
    return pixels.float().div_(255), parsed_prompts


def load_json(body: bytes) -> Any:
    """Parse a JSON body with a limited number of values.

    Raises:
        BadRequest: if the body is not JSON, has too many values or nests too deeply.
    """
    if (values := sum(map(body.count, (b"[", b"{", b",", b":")))) > MAX_VALUES:
        raise BadRequest(f"the body must hold at most {MAX_VALUES} values. Found about {values}. Send fewer images.")
    try:
        return json.loads(body)
    except ValueError as error:  # includes bytes that are not text
        raise BadRequest(f"the body must be JSON. Found something else: {error}.") from error
    except RecursionError as error:
        raise BadRequest("the body must be JSON of a few levels. Found too many. Keep metadata flat.") from error


def with_index(index: int, read: Any, image: Any) -> Any:
    """Return `read(image)`; errors contain the index of the image.

    Raises:
        BadRequest: if the image cannot be read.
    """
    try:
        return read(image)
    except ValueError as error:
        raise BadRequest(f"images[{index}]: {error}") from error


def to_prompt(index: int, value: Any) -> Prompt:
    """Convert a JSON value of a request to a prompt.

    Raises:
        BadRequest: if it has no text or source, or its metadata is not a mapping.
    """
    expected = {"text": str, "source": str, "metadata": dict}
    prompt = {"metadata": {}, **value} if isinstance(value, dict) else {}
    if set(prompt) != set(expected) or not all(isinstance(prompt[name], kind) for name, kind in expected.items()):
        raise BadRequest(
            f'prompts[{index}] must be {{"text": string, "source": string, "metadata": object}}. Found {short_repr(value)}.'
        )
    try:
        return Prompt(**prompt)
    except ValueError as error:  # metadata nests too deeply
        raise BadRequest(f"prompts[{index}]: {error}") from error
