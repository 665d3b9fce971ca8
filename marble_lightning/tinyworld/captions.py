"""Scenes with captions in the style of the published prompts: GenEval's six tags, signs and general captions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from marble_lightning.tinyworld.scenes import BACKGROUNDS, CELL, COLOURS, INK, SHAPES, WORDS, Scene, Sign, Thing

NUMERALS = {2: "two", 3: "three", 4: "four"}
GAPS = ((0, 4), (0, 5), (1, 5))
"""First cells of two things of three cells each, with at least one cell between them."""
RELATIONS = ("left of", "right of", "above", "below")
OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of", "a rendering of", "a sketch of")
STYLES = ("digital art of", "oil painting of", "concept art of", "sticker of", "poster of")
QUALITIES = ("detailed", "masterpiece", "vivid", "cinematic", "4k")
LIGHTS = {"mist": "in mist", "sand": "in sand", "dawn": "at dawn", "dusk": "at night"}
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
    return shape + "s"


def clause(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    """Return one entry of GenEval's `include` list."""
    return {"class": shape, "count": count, **more}


def _background(rng: random.Random) -> str:
    return rng.choice(list(BACKGROUNDS))


def _thing(shape: str, colour: str, column: int, row: int, cells: int) -> Thing:
    """Return a thing that fills a square of cells, whose upper left one is (column, row), but for its shadow."""
    side = cells * CELL - 2
    return Thing(shape, colour, column * CELL + side / 2, row * CELL + side / 2, side, side)


def _pair(rng: random.Random) -> list[tuple[int, int]]:
    """Cells of two things side by side or one above the other, in random order, three cells wide."""
    (before, after), across = rng.choice(GAPS), rng.randint(1, 4)
    along = [(before, across), (after, min(max(across + rng.randint(-1, 1), 1), 4))]
    rng.shuffle(along)
    return along if rng.random() < 0.5 else [(row, column) for column, row in along]


def _scatter(rng: random.Random, names: list[tuple[str, str]]) -> Scene:
    """Place things without contact: one near the middle, two in opposite halves, more in separate quarters."""
    count = len(names)
    if count == 1:
        places, cells = [(rng.randint(1, 3), rng.randint(1, 3))], 4
    elif count == 2:
        places, cells = _pair(rng), 3
    else:
        places, cells = rng.sample([(column, row) for column in (1, 5) for row in (1, 5)], count), 2
    things = [_thing(*name, *place, cells) for name, place in zip(names, places, strict=True)]
    return Scene(_background(rng), tuple(things))


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
    (before, after), across = rng.choice(GAPS), rng.randint(1, 4)
    along = (before, after) if relation in ("left of", "above") else (after, before)
    places = [(cell, across) if relation in ("left of", "right of") else (across, cell) for cell in along]
    things = tuple(_thing(shape, _colour(rng), *place, 3) for shape, place in zip((first, second), places, strict=True))
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
    return Captioned(f'{opening} "{word}"', Scene(_background(rng), sign=Sign(word, board)), "ocr")


def general(rng: random.Random) -> Captioned:
    """Draw an example of a general caption with style and quality words; the word for the light sets the background."""
    count = rng.choice((1, 1, 2))
    shapes, colours = rng.sample(SHAPES, count), rng.sample(list(COLOURS), count)
    background = rng.choice(list(LIGHTS))
    scene = replace(_scatter(rng, list(zip(shapes, colours, strict=True))), background=background)
    striped = rng.random() < 0.25
    if striped:
        scene = scene.with_thing(0, replace(scene.things[0], striped=True))
    names = [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    content = " and ".join([f"a striped {names[0]}" if striped else f"a {names[0]}", *(f"a {name}" for name in names[1:])])
    if count == 1 and rng.random() < 0.3:
        scene = with_confetti(scene, rng)
        content += " with confetti"
    caption = f"{rng.choice(STYLES)} {content} {LIGHTS[background]}, {rng.choice(QUALITIES)}"
    return Captioned(caption, scene, "pickscore")


def with_confetti(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene under 12 to 48 pieces of confetti."""
    return replace(scene, confetti=rng.randint(12, 48), seed=rng.getrandbits(31))


SHARES = {"geneval": 0.62, "ocr": 0.15, "pickscore": 0.23}
"""Shares of the sources in the training data of the base model. Signs have a fixed position and are learned before shapes,
so their share is small: the base model must leave room for learning to spell."""


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
