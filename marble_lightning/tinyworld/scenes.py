"""Scenes and how to draw them: coloured shapes, or a sign with a word, on a soft background, 64 x 64 pixels.

Everything lies on a grid of 8 pixels, the grid of the autoencoder's latents, so that a small network can learn to draw it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
"""Side of an image in pixels."""
CELL = 8
"""Side of a cell of the grid in pixels, equal to the autoencoder's factor."""
OVERSAMPLING = 4
"""Scenes are drawn larger by this factor and averaged down, so that edges are smooth."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 44, 44),
    "orange": (248, 142, 28),
    "yellow": (246, 220, 48),
    "green": (44, 164, 74),
    "blue": (44, 92, 222),
    "purple": (140, 60, 180),
}
"""Names and RGB values of the colours of things."""
PAINTS = COLOURS | {"black": (18, 18, 22), "white": (252, 252, 252)}
"""All colours for drawing. No thing of a caption is black or white."""

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "mist": ((206, 222, 226), (168, 192, 200)),
    "sand": ((232, 218, 202), (200, 180, 160)),
    "dawn": ((238, 212, 214), (206, 176, 188)),
    "dusk": ((128, 130, 152), (88, 90, 112)),
}
"""RGB values of each background at the top and at the bottom; all are far from every colour of things."""

SHAPES = ("circle", "square", "triangle", "star")
WORDS = (
    "GO", "UP", "NO", "WE", "OK", "ON", "BUS", "CAR", "TEA", "SUN",
    "BAR", "YES", "STOP", "OPEN", "EXIT", "TAXI", "CAFE", "SALE", "PARK", "SHOP",
)  # fmt: skip
"""Words on signs, two to four letters. They are few, so that a small network can learn to spell them."""
LETTER = 16
"""Width of each letter of a sign in pixels."""

INK = {"white": "black", "yellow": "black", "blue": "white", "red": "white", "green": "white"}
"""Colour of the letters by colour of the board."""


@dataclass(frozen=True)
class Thing:
    """One object: shape, colour, centre in pixels, width and height in pixels, amount of distortion (`warp`), stripes."""

    shape: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    warp: float = 0.0
    striped: bool = False


@dataclass(frozen=True)
class Sign:
    """A board across the image with a word in capitals."""

    word: str
    board: str


@dataclass(frozen=True)
class Scene:
    """A background, the things on it, an optional sign, and pieces of confetti over all of it.

    `flood` is the colour of the whole background, if it is not the usual one. `seed` sets where the confetti lies.
    """

    background: str
    things: tuple[Thing, ...] = ()
    sign: Sign | None = None
    confetti: int = 0
    seed: int = 0
    flood: str | None = None

    def with_thing(self, index: int, thing: Thing) -> Scene:
        """Return the same scene with one thing replaced."""
        return replace(self, things=(*self.things[:index], thing, *self.things[index + 1 :]))


def unit_outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in the square from -1 to 1."""
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 32, endpoint=False)]
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "star":
        radii = (1.06, 0.46) * 5
        return [
            (radius * math.sin(math.pi * corner / 5), 0.06 - radius * math.cos(math.pi * corner / 5))
            for corner, radius in enumerate(radii)
        ]
    raise ValueError(f"A shape must be one of {', '.join(SHAPES)}. Found {shape!r}.")


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the polygon of a thing in pixels; `warp` shifts its corners by a fixed pattern."""
    unit = unit_outline(thing.shape)
    points = []
    for index, (x, y) in enumerate(unit):
        bend = 1 + thing.warp * math.sin(2.4 * index * len(unit) / 4 + 5.0 * thing.warp)
        points.append((thing.x + bend * x * thing.width / 2, thing.y + bend * y * thing.height / 2))
    return points


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene.

    Returns:
        RGB image, uint8, shape (64, 64, 3).
    """
    image = _backdrop(scene.background, scene.flood).copy()
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(image, canvas, thing, scene)
    if scene.sign is not None:
        _draw_sign(canvas, scene.sign)
    pieces = np.random.default_rng(scene.seed)
    for _ in range(scene.confetti):
        x, y = (pieces.uniform(1, SIZE - 5, 2) * OVERSAMPLING).tolist()
        side = 4 * OVERSAMPLING
        canvas.rectangle([x, y, x + side, y + side], fill=COLOURS[str(pieces.choice(list(COLOURS)))])
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _draw_thing(image: Image.Image, canvas: ImageDraw.ImageDraw, thing: Thing, scene: Scene) -> None:
    """Draw a thing with a shadow down to the right."""
    points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in outline(thing)]
    shift = 1.5 * OVERSAMPLING
    shadow = tuple(int(0.72 * value) for value in BACKGROUNDS[scene.background][1])
    if scene.flood is None:
        canvas.polygon([(x + shift, y + shift) for x, y in points], fill=shadow)
    colour = PAINTS[thing.colour]
    canvas.polygon(points, fill=colour)
    if thing.striped:
        mask = Image.new("1", image.size)
        ImageDraw.Draw(mask).polygon(points, fill=1)
        lighter = tuple(int(value + 0.3 * (255 - value)) for value in colour)
        image.paste(lighter, (0, 0), Image.fromarray(np.asarray(mask) & _stripes()))


def _draw_sign(canvas: ImageDraw.ImageDraw, sign: Sign) -> None:
    """Draw a board over the middle of the image, and each letter in the middle of its columns of the grid."""
    edge, top, bottom = OVERSAMPLING, 14 * OVERSAMPLING, 50 * OVERSAMPLING - 1
    canvas.rounded_rectangle([edge, top, SIZE * OVERSAMPLING - edge - 1, bottom], 5 * OVERSAMPLING, PAINTS[sign.board])
    start = SIZE / 2 - LETTER * (len(sign.word) - 1) / 2
    for index, letter in enumerate(sign.word):
        place = ((start + LETTER * index) * OVERSAMPLING, 32.5 * OVERSAMPLING)
        canvas.text(place, letter, PAINTS[INK[sign.board]], _font(), "mm", stroke_width=OVERSAMPLING // 4)


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(22 * OVERSAMPLING)


@lru_cache
def _backdrop(background: str, flood: str | None) -> Image.Image:
    """The background before anything is drawn on it, oversampled."""
    side = SIZE * OVERSAMPLING
    if flood is not None:
        return Image.new("RGB", (side, side), PAINTS[flood])
    top, bottom = (np.array(colour, dtype=float) for colour in BACKGROUNDS[background])
    share = np.linspace(0, 1, side)[:, None, None]
    column = (top * (1 - share) + bottom * share).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(column, (side, side, 3)).copy())


@lru_cache
def _stripes() -> np.ndarray:
    """Vertical stripes, 4 of 8 pixels, as a mask of the oversampled image."""
    columns = np.arange(SIZE * OVERSAMPLING) // (4 * OVERSAMPLING) % 2 == 1
    return np.broadcast_to(columns, (len(columns), len(columns)))
