"""Scenes with captions in the style of the published prompts: GenEval's six tags, signs and general captions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from marble_lightning.tinyworld.scenes import BACKGROUNDS, COLOURS, INK, SHAPES, SIZE, WORDS, Scene, Sign, Thing

NUMERALS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPENINGS = (
    "a photo of", "a picture of", "an image of", "a drawing of",
    "a photograph of", "a rendering of", "a sketch of", "a print of",
)  # fmt: skip
STYLES = (
    "digital art of",
    "an oil painting of",
    "a flat illustration of",
    "a sticker of",
    "concept art of",
    "a poster of",
)
QUALITIES = (
    "highly detailed",
    "sharp focus",
    "vivid colors",
    "masterpiece",
    "4k",
    "award winning",
    "crisp",
    "cinematic",
)
LIGHTS = {"grey": "by day", "sand": "in sand", "mist": "in mist", "dusk": "at night"}
SIGN_OPENINGS = (
    "a {board} sign that says", "a {board} sign with the word", "a {board} poster that reads",
    "a photo of a {board} board with the text", "a {board} banner saying", "a {board} label with the inscription",
)  # fmt: skip


@dataclass(frozen=True)
class Captioned:
    """A scene with its caption; `source` is the name of the prompt set, `metadata` is for GenEval and may be empty."""

    caption: str
    scene: Scene
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def clause(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    """Return one entry of GenEval's `include` list."""
    return {"class": shape, "count": count, **more}


def _background(rng: random.Random) -> str:
    return rng.choice(list(BACKGROUNDS))


def _size(rng: random.Random, count: int) -> float:
    low, high = {1: (14, 20), 2: (12, 14)}.get(count, (10, 12))
    return rng.uniform(low, high)


def _scatter(rng: random.Random, names: list[tuple[str, str]]) -> Scene:
    """Place things at random without contact: one anywhere, two in opposite halves, more in separate quarters."""
    size = _size(rng, len(names))
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    if len(names) == 1:
        places = [(rng.uniform(low, high), rng.uniform(low, high))]
    elif len(names) == 2:
        gap = size + 2
        a = rng.uniform(low, high - gap)
        b = rng.uniform(a + gap, high)
        along = [a, b]
        rng.shuffle(along)
        across = [rng.uniform(low, high) for _ in range(2)]
        places = list(zip(along, across, strict=True)) if rng.random() < 0.5 else list(zip(across, along, strict=True))
    else:
        middle, slack = SIZE / 4, SIZE / 4 - size / 2 - 0.75
        quarters = rng.sample([(i, j) for i in range(2) for j in range(2)], len(names))
        places = [
            (middle + i * SIZE / 2 + rng.uniform(-slack, slack), middle + j * SIZE / 2 + rng.uniform(-slack, slack))
            for i, j in quarters
        ]
    things = tuple(Thing(shape, colour, x, y, size, size) for (shape, colour), (x, y) in zip(names, places, strict=True))
    return Scene(_background(rng), things)


def _colour(rng: random.Random) -> str:
    return rng.choice(list(COLOURS))


def single_object(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `single_object`."""
    shape = rng.choice(SHAPES)
    return Captioned(
        f"{opening} a {shape}",
        _scatter(rng, [(shape, _colour(rng))]),
        "geneval",
        {"tag": "single_object", "include": [clause(shape)]},
    )


def two_object(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `two_object`."""
    first, second = rng.sample(SHAPES, 2)
    return Captioned(
        f"{opening} a {first} and a {second}",
        _scatter(rng, [(first, _colour(rng)), (second, _colour(rng))]),
        "geneval",
        {"tag": "two_object", "include": [clause(first), clause(second)]},
    )


def counting(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `counting`."""
    shape, count = rng.choice(SHAPES), rng.choice(list(NUMERALS))
    colour = _colour(rng)
    return Captioned(
        f"{opening} {NUMERALS[count]} {plural(shape)}",
        _scatter(rng, [(shape, colour)] * count),
        "geneval",
        {"tag": "counting", "include": [clause(shape, count)], "exclude": [clause(shape, count + 1)]},
    )


def colors(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `colors`."""
    shape, colour = rng.choice(SHAPES), _colour(rng)
    return Captioned(
        f"{opening} a {colour} {shape}",
        _scatter(rng, [(shape, colour)]),
        "geneval",
        {"tag": "colors", "include": [clause(shape, color=colour)]},
    )


def position(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `position`: the first shape has the relation to the second."""
    first, second = rng.sample(SHAPES, 2)
    relation = rng.choice(RELATIONS)
    size = _size(rng, 2)
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    slack = (high - low - size - 1) / 2  # so that they do not touch
    before, after = rng.uniform(low, low + slack), rng.uniform(high - slack, high)
    drift = rng.uniform(low + 2, high - 2)
    drifts = [drift + rng.uniform(-2, 2) for _ in range(2)]
    along = (before, after) if relation in ("left of", "above") else (after, before)
    flat = relation in ("left of", "right of")
    places = [(a, d) if flat else (d, a) for a, d in zip(along, drifts, strict=True)]
    things = tuple(
        Thing(shape, _colour(rng), x, y, size, size) for shape, (x, y) in zip((first, second), places, strict=True)
    )
    return Captioned(
        f"{opening} a {first} {relation} a {second}",
        Scene(_background(rng), things),
        "geneval",
        {"tag": "position", "include": [clause(second), clause(first, position=[relation, 0])]},
    )


def color_attr(rng: random.Random, opening: str) -> Captioned:
    """Draw an example of GenEval's `color_attr`: two shapes with different colours."""
    first, second = rng.sample(SHAPES, 2)
    one, other = rng.sample(list(COLOURS), 2)
    return Captioned(
        f"{opening} a {one} {first} and a {other} {second}",
        _scatter(rng, [(first, one), (second, other)]),
        "geneval",
        {"tag": "color_attr", "include": [clause(first, color=one), clause(second, color=other)]},
    )


GENEVAL: tuple[Callable[[random.Random, str], Captioned], ...] = (
    single_object, two_object, counting, colors, position, color_attr,
)  # fmt: skip
"""One function per GenEval tag."""


def sign(rng: random.Random) -> Captioned:
    """Draw an example of a sign with a quoted word, as in the published OCR prompts."""
    word, board = rng.choice(WORDS), rng.choice(list(INK))
    opening = rng.choice(SIGN_OPENINGS).format(board=board)
    place = Sign(word, board, SIZE / 2 + rng.uniform(-0.4, 0.4), SIZE / 2 + rng.uniform(-1, 1))
    return Captioned(f'{opening} "{word}"', Scene(_background(rng), sign=place), "ocr")


def general(rng: random.Random) -> Captioned:
    """Draw an example of a general caption with style and quality words; the word for the light sets the background."""
    count = rng.choice((1, 1, 2))
    shapes, colours = rng.sample(SHAPES, count), rng.sample(list(COLOURS), count)
    content = " and ".join(f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
    scene = _scatter(rng, list(zip(shapes, colours, strict=True)))
    background = rng.choice(list(LIGHTS))
    words = f"{LIGHTS[background]}, {rng.choice(QUALITIES)}"
    return Captioned(f"{rng.choice(STYLES)} {content} {words}", Scene(background, scene.things), "pickscore")


SHARES = {"geneval": 0.63, "ocr": 0.12, "pickscore": 0.25}
"""Shares of the sources in the training data of the base model. Signs have a fixed position and are learned long before
shapes, so their share is small: the base model must leave room for learning to spell."""


def held_out(caption: str) -> bool:
    """Whether a caption belongs to the held-out quarter, which is not in the training data of base and reward models."""
    return hashlib.blake2b(caption.encode(), digest_size=1).digest()[0] < 64


def draw_captioned(rng: random.Random, source: str | None = None, *, test: bool = False) -> Captioned:
    """Draw one captioned scene.

    Args:
        rng: Random number generator.
        source: `geneval`, `ocr` or `pickscore`; None draws one with the shares of `SHARES`.
        test: True draws a held-out caption, False a training caption.
    """
    source = source or rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    while True:
        if source == "geneval":
            example = rng.choice(GENEVAL)(rng, rng.choice(OPENINGS))
        elif source == "ocr":
            example = sign(rng)
        elif source == "pickscore":
            example = general(rng)
        else:
            raise ValueError(f"`source` must be one of {', '.join(SHARES)}. Found {source!r}.")
        if held_out(example.caption) == test:
            return example
