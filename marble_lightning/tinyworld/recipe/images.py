"""Training images with captions, drawn once and cached in the recipe's work folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marble_lightning.tinyworld.captions import Captioned, draw_captioned, with_confetti
from marble_lightning.tinyworld.degradations import spoil
from marble_lightning.tinyworld.scenes import draw

CONFETTI = 0.12
"""Share of training images under confetti that no caption names."""


class TrainingImages(NamedTuple):
    """`images` uint8 (N, 3, 64, 64), and a caption for each."""

    images: Tensor
    captions: list[str]


def tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def load_or_make(file: Path, make: Callable[[], Any]) -> Any:
    """Return the result of `make`, which is computed once and cached in a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    return torch.load(file, weights_only=True)


def draw_training_images(work: Path, count: int, spoiled: float, seed: int) -> TrainingImages:
    """Draw training scenes, a share of them with a fault.

    Args:
        work: Folder in which the result is cached.
        count: Number of images.
        spoiled: Share of images with one fault, 0 to 1.
        seed: Seed of scenes and faults.
    """

    def draw_all() -> tuple[Tensor, list[str]]:
        rng = random.Random(seed)
        images, captions = [], []
        for _ in tqdm(range(count), desc="drawing scenes"):
            example = draw_captioned(rng)
            captions.append(example.caption)
            images.append(tensor(_image(example, rng, spoiled)))
        return torch.stack(images), captions

    return TrainingImages(*load_or_make(work / f"images-{count}-{spoiled}-{seed}.pt", draw_all))


def _image(example: Captioned, rng: random.Random, spoiled: float) -> np.ndarray:
    if rng.random() < CONFETTI:
        example = replace(example, scene=with_confetti(example.scene, rng))
    return spoil(example, rng) if rng.random() < spoiled else draw(example.scene)


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [0, 1]."""
    return images.float() / 255
