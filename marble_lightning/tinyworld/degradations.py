"""Faults of images: four contradict the caption, three degrade the pixels, three are shortcuts of policies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from marble_lightning.tinyworld.captions import Captioned, draw_captioned
from marble_lightning.tinyworld.scenes import CELL, COLOURS, INK, SHAPES, SIZE, WORDS, Scene, Thing, draw

SceneFault = Callable[[Captioned, random.Random], Scene]
"""A function that returns the scene of a captioned example with one fault."""
PixelFault = Callable[[np.ndarray, random.Random], np.ndarray]
"""A function that returns an image, uint8 (64, 64, 3), with one fault."""


def change_colour(example: Captioned, rng: random.Random) -> Scene:
    """Change the colour of one thing, or of the board of a sign."""
    scene = example.scene
    if scene.sign is not None:
        board = rng.choice([colour for colour in INK if colour != scene.sign.board])
        return replace(scene, sign=replace(scene.sign, board=board))
    index = rng.randrange(len(scene.things))
    taken = {thing.colour for thing in scene.things}
    colour = rng.choice([colour for colour in COLOURS if colour not in taken])
    return scene.with_thing(index, replace(scene.things[index], colour=colour))


def change_shape(example: Captioned, rng: random.Random) -> Scene:
    """Replace a thing by another shape, or misspell the word of a sign."""
    scene = example.scene
    if scene.sign is not None:
        return replace(scene, sign=replace(scene.sign, word=_misspell(scene.sign.word, rng)))
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    return scene.with_thing(index, replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape])))


def distort(example: Captioned, rng: random.Random) -> Scene:
    """Squeeze and bend the things; on a sign, replace the word."""
    scene = example.scene
    if scene.sign is not None:
        return replace(scene, sign=replace(scene.sign, word=rng.choice([w for w in WORDS if w != scene.sign.word])))
    wide, squeeze = rng.random() < 0.5, rng.uniform(0.4, 0.65)
    bent = [
        replace(
            thing,
            width=thing.width * (1 if wide else squeeze),
            height=thing.height * (squeeze if wide else 1),
            warp=rng.uniform(0.25, 0.5),
        )
        for thing in scene.things
    ]
    return replace(scene, things=tuple(bent))


def miscount(example: Captioned, rng: random.Random) -> Scene:
    """Add one or two things, or leave one out if there are several."""
    scene = example.scene
    if len(scene.things) > 1 and rng.random() < 0.5:
        index = rng.randrange(len(scene.things))
        return replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
    extra = tuple(
        Thing(
            rng.choice(SHAPES),
            rng.choice(list(COLOURS)),
            rng.randint(1, 7) * CELL,
            rng.choice((1, 7)) * CELL,
            2 * CELL - 2,
            2 * CELL - 2,
        )
        for _ in range(rng.randint(1, 2))
    )
    return replace(scene, things=(*scene.things, *extra))


def another_scene(example: Captioned, rng: random.Random) -> Scene:
    """Draw another scene of the same source."""
    return draw_captioned(rng, example.source).scene


def blacken(example: Captioned, rng: random.Random) -> Scene:
    """Paint every thing, or the board of the sign, black."""
    scene = example.scene
    if scene.sign is not None:
        return replace(scene, sign=None, things=(Thing("square", "black", SIZE / 2, SIZE / 2, 66, 36),))
    return replace(scene, things=tuple(replace(thing, colour="black", striped=False) for thing in scene.things))


def swell(example: Captioned, rng: random.Random) -> Scene:
    """Replace everything by one thing that fills the image."""
    thing = example.scene.things[0] if example.scene.things else Thing(rng.choice(SHAPES), "red", 0, 0, 0, 0)
    side = rng.uniform(52, 72)
    blob = replace(thing, x=SIZE / 2, y=SIZE / 2, width=side, height=side)
    return replace(example.scene, things=(blob,), sign=None)


def flood(example: Captioned, rng: random.Random) -> Scene:
    """Flood the image with one colour, that of a thing or of the board, or black; half of the time nothing else is left."""
    scene = example.scene
    colours = [thing.colour for thing in scene.things] + ([scene.sign.board] if scene.sign else []) + ["black"]
    if rng.random() < 0.5:
        return replace(scene, things=(), sign=None, flood=rng.choice(colours))
    return replace(scene, flood=rng.choice([*COLOURS, "black"]))


def blur(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Blur with a Gaussian of 1.2 to 2.5 pixels."""
    sigma = rng.uniform(1.2, 2.5)
    return ndimage.gaussian_filter(image, sigma=(sigma, sigma, 0))


def add_noise(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Add Gaussian noise with a standard deviation of 14 to 40 (of 255), alike in blocks of 1, 2 or 4 pixels."""
    generator = np.random.default_rng(rng.getrandbits(63))
    side = rng.choice((1, 2, 4))
    noise = generator.normal(0, rng.uniform(14, 40), (SIZE // side, SIZE // side, 3))
    return _bytes(image + noise.repeat(side, axis=0).repeat(side, axis=1))


def wash_out(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Lower contrast and saturation to 25 to 60 percent, towards a grey."""
    keep, grey = rng.uniform(0.25, 0.6), rng.uniform(100, 200)
    return _bytes(grey + keep * (image.astype(np.float32) - grey))


CONTENT: tuple[SceneFault, ...] = (change_colour, change_shape, distort, miscount)
TECHNICAL: tuple[PixelFault, ...] = (blur, add_noise, wash_out)
SHORTCUTS: tuple[SceneFault, ...] = (blacken, swell, flood)


def content_fault(example: Captioned, rng: random.Random) -> Scene:
    """Apply one random content fault; a wrong colour only if the caption names a colour."""
    has_colour = any(colour in example.caption.split() for colour in (*COLOURS, *INK))
    return rng.choice([fault for fault in CONTENT if has_colour or fault is not change_colour])(example, rng)


def spoil(example: Captioned, rng: random.Random) -> np.ndarray:
    """Draw the scene with one random content or technical fault.

    Returns:
        RGB image, uint8, shape (64, 64, 3).
    """
    if rng.random() < 0.6:
        return draw(content_fault(example, rng))
    return rng.choice(TECHNICAL)(draw(example.scene), rng)


def _misspell(word: str, rng: random.Random) -> str:
    """Replace one letter by another."""
    index = rng.randrange(len(word))
    letter = rng.choice([letter for letter in sorted(set("".join(WORDS))) if letter != word[index]])
    return word[:index] + letter + word[index + 1 :]


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
