"""Images with captions to train on, drawn once and kept in the recipe's work folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marble_lightning.tinyworld.captions import captioned
from marble_lightning.tinyworld.degradations import spoil
from marble_lightning.tinyworld.scenes import draw


class TrainingImages(NamedTuple):
    """`images` uint8 (N, 3, 32, 32), and a caption for each."""

    images: Tensor
    captions: list[str]


def tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once and kept in a file."""
    if not file.exists():
        torch.save(make(), file)
    return torch.load(file, weights_only=True)


def drawn_pictures(work: Path, count: int, spoiled: float, seed: int) -> TrainingImages:
    """Draw training scenes, a share of them with a fault.

    Args:
        work: Folder that keeps the result.
        count: Number of images.
        spoiled: Share of images with one fault, 0 to 1.
        seed: Seed of scenes and faults.
    """

    def drawn() -> tuple[Tensor, list[str]]:
        rng = random.Random(seed)
        images, captions = [], []
        for _ in tqdm(range(count), desc="drawing scenes"):
            shown = captioned(rng)
            images.append(tensor(spoil(shown, rng) if rng.random() < spoiled else draw(shown.scene)))
            captions.append(shown.caption)
        return torch.stack(images), captions

    return TrainingImages(*kept(work / f"images-{count}-{spoiled}-{seed}.pt", drawn))


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [0, 1]."""
    return images.float() / 255
