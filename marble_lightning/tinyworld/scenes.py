"""Scenes and how to draw them: coloured shapes, or a sign with a word, on a plain background, 32 x 32 pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
"""Side of an image in pixels."""
OVERSAMPLING = 4
"""Scenes are drawn larger by this factor and averaged down, so that edges are smooth."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (246, 138, 22),
    "yellow": (246, 222, 40),
    "green": (36, 158, 62),
    "blue": (36, 78, 216),
    "purple": (136, 48, 170),
    "black": (16, 16, 18),
    "white": (252, 252, 252),
}
"""Names and RGB values of all colours except the backgrounds."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (142, 144, 148),
    "sand": (186, 168, 146),
    "mist": (156, 182, 186),
    "dusk": (100, 98, 118),
}
"""Names and RGB values of the backgrounds; all are far from every object colour."""

SHAPES = ("circle", "square", "triangle", "cross")
WORDS = ("GO", "UP", "NO", "HI", "OK", "BY", "WE", "US", "AX", "TV", "IF", "ME")
"""Words on signs. They are few and as large as the board allows, so that a small network can learn to spell them."""

INK = {"white": "black", "yellow": "black", "blue": "white", "red": "white"}
"""Colour of the letters by board colour."""
FONT_SIZE = 19


@dataclass(frozen=True)
class Thing:
    """One object: shape, colour, centre in pixels, width and height in pixels, and amount of distortion (`warp`)."""

    shape: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    warp: float = 0.0


@dataclass(frozen=True)
class Sign:
    """A board across the image with a word in capitals; `x` and `y` are its centre in pixels."""

    word: str
    board: str
    x: float = SIZE / 2
    y: float = SIZE / 2


@dataclass(frozen=True)
class Scene:
    """A background, the things on it, and an optional sign."""

    background: str
    things: tuple[Thing, ...] = ()
    sign: Sign | None = None

    def with_thing(self, index: int, thing: Thing) -> Scene:
        """Return the same scene with one thing replaced."""
        return replace(self, things=(*self.things[:index], thing, *self.things[index + 1 :]))


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the polygon of a thing in pixels; `warp` shifts its corners by a fixed pattern."""
    if thing.shape == "circle":
        unit = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 32, endpoint=False)]
    elif thing.shape == "square":
        unit = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif thing.shape == "triangle":
        unit = [(0, -1), (1, 1), (-1, 1)]
    elif thing.shape == "cross":
        a = 0.34
        unit = [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    else:
        raise ValueError(f"A shape must be one of {', '.join(SHAPES)}. Found {thing.shape!r}.")
    points = []
    for index, (x, y) in enumerate(unit):
        bend = 1 + thing.warp * math.sin(2.4 * index * len(unit) / 4 + 5.0 * thing.warp)
        points.append((thing.x + bend * x * thing.width / 2, thing.y + bend * y * thing.height / 2))
    return points


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene.

    Returns:
        RGB image, uint8, shape (32, 32, 3).
    """
    scale = OVERSAMPLING
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        canvas.polygon([(x * scale, y * scale) for x, y in outline(thing)], fill=COLOURS[thing.colour])
    if scene.sign is not None:
        sign = scene.sign
        x, y, half_width, half_height = (value * scale for value in (sign.x, sign.y, 15.5, 10.5))
        canvas.rectangle([x - half_width, y - half_height, x + half_width, y + half_height], fill=COLOURS[sign.board])
        canvas.text((x, y), sign.word, font=_font(FONT_SIZE * scale), fill=COLOURS[INK[sign.board]], anchor="mm")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
