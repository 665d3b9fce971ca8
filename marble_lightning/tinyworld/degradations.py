"""Six faults of images: three degrade the pixels (technical), three contradict the caption (content)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from marble_lightning.tinyworld.captions import Captioned
from marble_lightning.tinyworld.scenes import COLOURS, INK, SHAPES, SIZE, WORDS, Scene, Thing, draw


def blur(scene: Scene, rng: random.Random) -> np.ndarray:
    """Blur with a Gaussian of 1.0 to 1.8 pixels."""
    sigma = rng.uniform(1.0, 1.8)
    return ndimage.gaussian_filter(draw(scene), sigma=(sigma, sigma, 0))


def add_noise(scene: Scene, rng: random.Random) -> np.ndarray:
    """Add Gaussian pixel noise with a standard deviation of 28 to 50 (of 255)."""
    generator = np.random.default_rng(rng.getrandbits(63))
    image = draw(scene).astype(np.float32)
    return _bytes(image + generator.normal(0, rng.uniform(28, 50), image.shape))


def wash_out(scene: Scene, rng: random.Random) -> np.ndarray:
    """Lower contrast and saturation to 20 to 45 percent, towards a grey."""
    keep, grey = rng.uniform(0.2, 0.45), rng.uniform(120, 190)
    return _bytes(grey + keep * (draw(scene).astype(np.float32) - grey))


def change_colour(scene: Scene, rng: random.Random) -> np.ndarray:
    """Change the colour of one thing, or of the board of a sign."""
    if scene.sign is not None:
        board = rng.choice([c for c in INK if c != scene.sign.board])
        return draw(replace(scene, sign=replace(scene.sign, board=board)))
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    taken = {other.colour for other in scene.things}
    return draw(scene.with_thing(index, replace(thing, colour=rng.choice([c for c in COLOURS if c not in taken]))))


def distort(scene: Scene, rng: random.Random) -> np.ndarray:
    """Squeeze and bend the things, or replace one by another shape; on a sign, replace the word."""
    if scene.sign is not None:
        word = rng.choice([word for word in WORDS if word != scene.sign.word])
        return draw(replace(scene, sign=replace(scene.sign, word=word)))
    if rng.random() < 0.5:
        index = rng.randrange(len(scene.things))
        thing = scene.things[index]
        return draw(scene.with_thing(index, replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))))
    squeeze = rng.uniform(0.4, 0.65)
    wide = rng.random() < 0.5
    bent = [
        replace(
            thing,
            width=thing.width * (1 if wide else squeeze),
            height=thing.height * (squeeze if wide else 1),
            warp=rng.uniform(0.25, 0.5),
        )
        for thing in scene.things
    ]
    return draw(replace(scene, things=tuple(bent)))


def clutter(scene: Scene, rng: random.Random) -> np.ndarray:
    """Scatter two to four small shapes over the image."""
    extra = [
        Thing(
            rng.choice(SHAPES),
            rng.choice(list(COLOURS)),
            rng.uniform(2, SIZE - 2),
            rng.uniform(2, SIZE - 2),
            size,
            size,
        )
        for size in (rng.uniform(6, 9) for _ in range(rng.randint(2, 4)))
    ]
    original = draw(scene)
    cluttered = draw(replace(scene, things=(*scene.things, *extra), sign=None))
    without_sign = draw(replace(scene, sign=None))
    changed = (cluttered != without_sign).any(axis=-1, keepdims=True)
    return np.where(changed, cluttered, original)


Fault = Callable[[Scene, random.Random], np.ndarray]
TECHNICAL: tuple[Fault, ...] = (blur, add_noise, wash_out)
CONTENT: tuple[Fault, ...] = (change_colour, distort, clutter)


def spoil(example: Captioned, rng: random.Random, faults: Sequence[Fault] = (*TECHNICAL, *CONTENT)) -> np.ndarray:
    """Draw the scene with one random fault; a wrong colour only if the caption contains a colour.

    Returns:
        RGB image, uint8, shape (32, 32, 3).
    """
    has_colour = any(colour in example.caption for colour in COLOURS)
    return rng.choice([fault for fault in faults if has_colour or fault is not change_colour])(example.scene, rng)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
