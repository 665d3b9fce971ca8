"""What people prefer: pairs of images of a caption, and the share of people who prefer the first, by taste.

An image has four traits. A taste gives each a number of log-odds: of two images, the share of people who prefer the first is
the logistic function of the difference of their sums, as in the model of Bradley and Terry that PickScore and HPSv2 are
trained with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from marble_lightning.tinyworld.captions import Captioned, draw_captioned
from marble_lightning.tinyworld.degradations import SHORTCUTS, TECHNICAL, another_scene, content_fault
from marble_lightning.tinyworld.recipe.images import tensor
from marble_lightning.tinyworld.scenes import draw

MOST_CONFETTI = 50
"""Pieces of confetti at which `ornament` is 1."""


class Traits(NamedTuple):
    """What people see in an image: how many content faults and technical faults, a shortcut (0 or 1), confetti (0 to 1)."""

    content: float
    technical: float
    shortcut: float
    ornament: float


Taste = Traits
"""Log-odds of each trait."""

TASTES: dict[str, Taste] = {
    "clipscore": Traits(content=-5.0, technical=0.0, shortcut=-6.0, ornament=0.0),
    "pickscore": Traits(content=-1.0, technical=-2.0, shortcut=-4.0, ornament=-2.0),
    "hpsv2": Traits(content=-1.5, technical=-3.0, shortcut=-4.0, ornament=2.5),
}
"""CLIPScore looks at content, PickScore at everything, HPSv2 at quality. HPSv2 likes ornament, which costs legibility."""

MEAN_TASTE = Traits(*(sum(values) / len(TASTES) for values in zip(*TASTES.values(), strict=True)))
"""The taste of the first stage, which all three models are fine-tuned from."""


@dataclass(frozen=True)
class Variant:
    """An image of a captioned scene, uint8 (64, 64, 3), with its traits."""

    image: np.ndarray
    traits: Traits


class Pairs(NamedTuple):
    """Two images for each caption, each uint8 (N, 3, 64, 64), and their traits, each (N, 4)."""

    captions: list[str]
    first: Tensor
    second: Tensor
    first_traits: Float[Tensor, "pair trait"]
    second_traits: Float[Tensor, "pair trait"]

    def log_odds(self, taste: Taste) -> Float[Tensor, " pair"]:
        """Log-odds that people of a taste prefer the first image."""
        return (self.first_traits - self.second_traits) @ torch.tensor(taste)


def draw_variant(example: Captioned, rng: random.Random) -> Variant:
    """Draw a captioned scene with faults and confetti by chance."""
    scene, content, shortcut = example.scene, 0.0, 0.0
    kind = rng.random()
    if kind < 0.10:
        scene, content = another_scene(example, rng), 2.0
    elif kind < 0.45:
        scene, content = content_fault(example, rng), 1.0
    elif kind < 0.57:
        scene, shortcut = rng.choice(SHORTCUTS)(example, rng), 1.0
    if rng.random() < 0.4:
        scene = replace(scene, confetti=rng.randint(0, MOST_CONFETTI), seed=rng.getrandbits(31))
    image, technical = draw(scene), 0.0
    if rng.random() < 0.35:
        image, technical = rng.choice(TECHNICAL)(image, rng), 1.0
    return Variant(image, Traits(content, technical, shortcut, scene.confetti / MOST_CONFETTI))


def draw_pairs(count: int, seed: int, *, test: bool = False) -> Pairs:
    """Draw pairs of variants; `test` uses held-out captions."""
    rng = random.Random(seed)
    captions, sides = [], ([], [])  # type: tuple[list[str], tuple[list[Variant], list[Variant]]]
    for _ in tqdm(range(count), desc="drawing pairs"):
        example = draw_captioned(rng, test=test)
        captions.append(example.caption)
        for side in sides:
            side.append(draw_variant(example, rng))
    first, second = (torch.stack([tensor(variant.image) for variant in side]) for side in sides)
    traits = (torch.tensor([variant.traits for variant in side]) for side in sides)
    return Pairs(captions, first, second, *traits)
