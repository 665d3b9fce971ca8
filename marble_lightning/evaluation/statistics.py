"""Statistics of held-out scores: means with standard errors, per prompt, by tag, paired changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rewards import Prompt, Reward

MEAN_OF_TAGS = "mean_of_tags"
"""Beside the tags themselves: a benchmark's score, where its tags count alike."""


class Summary(NamedTuple):
    """Mean and standard error of the scores that are there, and how many there are."""

    mean: float
    error: float
    n: int


def summarise(scores: Float[Tensor, " prompt"]) -> Summary:
    """Mean, standard error of the mean and number of the scores that are not NaN."""
    there = scores[~scores.isnan()].double()
    n = len(there)
    error = float(there.std() / n**0.5) if n > 1 else float("nan")
    return Summary(float(there.mean()) if n else float("nan"), error, n)


def per_prompt(rows: Float[Tensor, "image index_and_judge"], prompts: int, images: int) -> Float[Tensor, "prompt reward"]:
    """Mean scores of each prompt, in the prompts' order: images of one prompt are no independent evidence.

    Args:
        rows: Each image's index, then its scores; in any order.
        prompts: Number of prompts. The scores of one without an image are NaN.
        images: Images of a prompt, which have neighbouring indices.

    Raises:
        ValueError: An image is there twice.
    """
    indices, times = rows[:, 0].long().unique(return_counts=True)
    if (times > 1).any():
        raise ValueError(f"Each held-out image must be scored once. Found {int(indices[times > 1][0])} more than once.")
    pictures = torch.full((prompts * images, rows.shape[1] - 1), torch.nan)
    pictures[rows[:, 0].long()] = rows[:, 1:]
    return pictures.reshape(prompts, images, -1).nanmean(1)


def by_tag(
    reward_models: Mapping[str, Reward], prompts: Sequence[Prompt], scores: Float[Tensor, "prompt reward"]
) -> dict[str, Float[Tensor, " prompt"]]:
    """Scores of each judge and tag, as `geneval/counting`, NaN for other prompts; then the mean over its tags, (1,)."""
    found = dict[str, Tensor]()
    for (name, reward_model), column in zip(reward_models.items(), scores.T, strict=True):
        tags = [reward_model.tag(prompt) if reward_model.supports(prompt) else None for prompt in prompts]
        own = {
            f"{name}/{tag}": torch.where(torch.tensor([each == tag for each in tags]), column, torch.nan)
            for tag in dict.fromkeys(filter(None, tags))
        }
        found |= own
        if own:
            found[f"{name}/{MEAN_OF_TAGS}"] = torch.stack([each.nanmean() for each in own.values()]).mean()[None]
    return found


def changes(base: Float[Tensor, "prompt reward"], trained: Float[Tensor, "prompt reward"]) -> list[Summary]:
    """Change of each judge's score, prompt by prompt: both columns share prompts and noise, so errors are paired."""
    return [summarise(column) for column in (trained - base).T]


def summaries(
    scores: Float[Tensor, "prompt reward"], base: Float[Tensor, "prompt reward"] | None, heading: str = "trained"
) -> dict[str, list[Summary]]:
    """Columns of a table, judge by judge: `heading`, and where the base is known `base` and `change`.

    The base's mean is over the prompts that have a score of both, so that the change is the difference of the two where
    none is missing.
    """
    columns = {heading: [summarise(column) for column in scores.T]}
    if base is None:
        return columns
    both = torch.where(scores.isnan(), torch.nan, base)
    return {"base": [summarise(column) for column in both.T], **columns, "change": changes(base, scores)}
