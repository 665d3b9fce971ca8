"""Grids of images with captions, and a heat map of cosines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewards.texts import shorten

SIDE = 160
"""Side of an image in a grid, in pixels; images are resized to it."""
LINE = 13
"""Height of a line of text in pixels."""
CAPTION = 1000
"""At most this many characters of a line of text are drawn; a prompt of a megabyte would make an image of gigabytes."""


def to_image(image: Float[Tensor, "3 pixel pixel"]) -> Image.Image:
    """Convert an image in [0, 1] to an 8-bit PIL image."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def scores_text(scores: Float[Tensor, " reward"], names: Sequence[str]) -> str:
    """The scores that are not NaN as text, e.g. `ocr 0.67  clip 0.31`."""
    return "  ".join(f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True) if score == score)


def grid(images: Sequence[Tensor], texts: Sequence[str], columns: int = 4) -> Float[Tensor, "3 height width"]:
    """Arrange images in rows, with a text under each.

    Args:
        images: Images in [0, 1], each (3, pixel, pixel).
        texts: One text per image. Long lines are wrapped, and newlines are kept.
        columns: Number of images in a row.

    Returns:
        One image in [0, 1], for TensorBoard's `add_image`.
    """
    wrapped = [
        [part for line in text.split("\n") for part in textwrap.wrap(shorten(line, CAPTION), 26) or [""]] for text in texts
    ]
    height = SIDE + LINE * max(map(len, wrapped)) + 6
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (SIDE + 6), rows * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = (index % columns) * (SIDE + 6) + 3, (index // columns) * height + 3
        sheet.paste(to_image(image).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        canvas.multiline_text((x, y + SIDE), "\n".join(lines), fill="black", font=font, spacing=LINE - 11)
    return _tensor(sheet)


def cosine_heatmap(cosines: Float[Tensor, "reward reward"], names: Sequence[str]) -> Float[Tensor, "3 height width"]:
    """A matrix of cosines as coloured cells with numbers: green is positive, red is negative, grey is NaN."""
    longest = max(map(len, names))
    cell, width, margin = 44, max(44, 6 * longest), 8 + 7 * longest
    sheet = Image.new("RGB", (margin + width * len(names), 2 * LINE + cell * len(names)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, name in enumerate(names):
        y = 2 * LINE + row * cell
        canvas.text((4, y + cell // 2 - 6), name, fill="black", font=font)
        canvas.text((margin + row * width + 2, LINE // 2), name, fill="black", font=font)
        for column, value in enumerate(cosines[row].tolist()):
            known = value == value
            faded = round(255 * (1 - min(abs(value), 1))) if known else 0
            colour = ((faded, 255, faded) if value >= 0 else (255, faded, faded)) if known else (190, 190, 190)
            x = margin + column * width
            canvas.rectangle((x, y, x + width - 2, y + cell - 2), fill=colour)
            canvas.text((x + 8, y + cell // 2 - 6), f"{value:+.2f}" if known else "-", fill="black", font=font)
    return _tensor(sheet)


def _tensor(sheet: Image.Image) -> Float[Tensor, "3 height width"]:
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1).float() / 255
