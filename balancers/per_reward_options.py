"""Options given per reward: from names to one number for each."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def weights_by_name(
    weights: Mapping[str, float] | None, reward_names: Sequence[str], *, option: str = "weights"
) -> Float[Tensor, "reward"]:
    """One weight per reward, in the order of `reward_names`; 1 where `weights` says nothing. In float64.

    Args:
        weights: by name.
        reward_names: all rewards.
        option: what the user calls it.

    Raises:
        ValueError: a name is unknown, or a weight is not finite and > 0 in float32, in which it is used.

    >>> weights_by_name({"ocr": 2.0}, ["clip", "ocr"]).tolist()
    [1.0, 2.0]
    """
    weights = dict(weights or {})
    _known(weights, reward_names, option)
    used = torch.tensor(list(weights.values()), dtype=torch.float32).tolist()
    if wrong := {name: weights[name] for name, value in zip(weights, used, strict=True) if not 0 < value < math.inf}:
        raise ValueError(
            f"`{option}` must be finite and > 0 in float32. Found {wrong}. To measure a reward without learning it, "
            "move it from `rewards` to `metrics`."
        )
    return torch.tensor([weights.get(name, 1.0) for name in reward_names], dtype=torch.float64)


def group_rows(groups: Mapping[str, Sequence[str]] | None, reward_names: Sequence[str]) -> Float[Tensor, "group reward"]:
    """Which rewards a group holds, a row each, 1 or 0; a reward in no group is one by itself. In float64.

    Raises:
        ValueError: a name is unknown or in two groups, or a group is empty.

    >>> group_rows({"people": ["pick", "hps"]}, ["pick", "ocr", "hps"]).tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    groups = dict(groups or {})
    members = [name for group in groups.values() for name in group]
    _known(members, reward_names, "groups")
    if twice := sorted({name for name in members if members.count(name) > 1}):
        raise ValueError(f"`groups` must hold a reward once. Found {', '.join(twice)} twice.")
    if empty := [name for name, group in groups.items() if not group]:
        raise ValueError(f"`groups` must hold at least one reward each. Found none in {', '.join(empty)}.")
    each = [*groups.values(), *([name] for name in reward_names if name not in members)]
    return torch.tensor([[float(name in group) for name in reward_names] for group in each], dtype=torch.float64)


def _known(names: Iterable[str], reward_names: Sequence[str], option: str) -> None:
    if unknown := [name for name in names if name not in reward_names]:
        raise ValueError(
            f"`{option}` must use the names of the rewards: {', '.join(reward_names)}. Found {', '.join(unknown)}."
        )
