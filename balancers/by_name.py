"""Options given per reward: from names to one number for each."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def weights_by_name(weights: Mapping[str, float] | None, reward_names: Sequence[str]) -> Float[Tensor, "reward"]:
    """One weight per reward, in the order of `reward_names`; 1 where `weights` says nothing. In float64.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or all are zero.

    >>> weights_by_name({"ocr": 2.0}, ["clip", "ocr"]).tolist()
    [1.0, 2.0]
    """
    weights = dict(weights or {})
    if unknown := [name for name in weights if name not in reward_names]:
        raise ValueError(
            f"`weights` must use the names of the rewards: {', '.join(reward_names)}. Found {', '.join(unknown)}."
        )
    if wrong := {name: value for name, value in weights.items() if not (math.isfinite(value) and value >= 0)}:
        raise ValueError(f"`weights` must be finite and >= 0. Found {wrong}.")
    values = torch.tensor([weights.get(name, 1.0) for name in reward_names], dtype=torch.float64)
    if not values.any():
        raise ValueError("`weights` must leave at least one reward above 0. Found all 0.")
    return values
