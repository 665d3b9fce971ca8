"""The images that `predict` has written, with their scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor


class Predictions:
    """A folder of `marble-lightning predict`.

    Args:
        folder: The folder of `predictions.folder`, with `images.jsonl`.

    Raises:
        ValueError: The folder has no images of `predict`, or they have no scores.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "images.jsonl"
        if not file.exists():
            raise ValueError(
                f"`folder` must have images of `predict`, with {file.name}. Found none in {self.folder.resolve()}."
            )
        self.records: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        """File, index, prompt, source and scores of each image, in the order of the prompts."""
        self.rewards = list(dict.fromkeys(name for record in self.records for name in record["scores"]))
        """Names of the rewards and metrics that scored any of the images."""
        if not self.rewards:
            raise ValueError(f"The images must have scores. Found none in {file}; use `--predictions.scores true`.")

    def scores(self, names: Sequence[str] | None = None) -> Float[Tensor, "image reward"]:
        """Scores of each image by some rewards, or by all; NaN where a reward does not apply."""
        names = self.rewards if names is None else names
        return torch.tensor([[record["scores"].get(name, torch.nan) for name in names] for record in self.records])

    @cached_property
    def groups(self) -> Int[Tensor, " image"]:
        """Index of each image's prompt, from 0."""
        keys = [(record["source"], record["prompt"]) for record in self.records]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return torch.tensor([numbers[key] for key in keys])

    def image(self, index: int) -> Image.Image:
        """The image of a record."""
        return Image.open(self.folder / self.records[index]["file"]).convert("RGB")
