"""Cheap rewards; one applies to some prompts only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewards import Prompt, Reward


class Brightness(Reward):
    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))


class Redness(Brightness):
    """Applies to prompts of GenEval only."""

    def applies_to(self, prompt: Prompt) -> bool:
        return prompt.source == "geneval"

    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


class Contrast(Brightness):
    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        return images.std((1, 2, 3))
