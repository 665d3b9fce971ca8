"""Options by reward name, as one number per reward."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def weights_by_name(
    weights: Mapping[str, float] | None, reward_names: Sequence[str], *, option: str = "weights"
) -> Float[Tensor, " reward"]:
    """One weight per reward in float64, in the order of `reward_names`; 1 for rewards that `weights` does not name.

    Args:
        weights: Weights by name.
        reward_names: All rewards.
        option: Name of the option, for error messages.

    Raises:
        ValueError: A name is unknown, or a weight is not finite and > 0 in float32, the precision it is used in.

    >>> weights_by_name({"ocr": 2.0}, ["clip", "ocr"]).tolist()
    [1.0, 2.0]
    """
    weights = dict(weights or {})
    check_known(weights, reward_names, option)
    used = torch.tensor(list(weights.values()), dtype=torch.float32).tolist()
    if wrong := {name: weights[name] for name, value in zip(weights, used, strict=True) if not 0 < value < math.inf}:
        raise ValueError(
            f"`{option}` must be finite and > 0 in float32. Found {wrong}. To evaluate a reward without training on it, "
            "move it from `rewards` to `metrics`."
        )
    return torch.tensor([weights.get(name, 1.0) for name in reward_names], dtype=torch.float64)


def group_rows(groups: Mapping[str, Sequence[str]] | None, reward_names: Sequence[str]) -> Float[Tensor, "group reward"]:
    """Members of each group as rows of 0 and 1 in float64; a reward outside all groups is a group by itself.

    Raises:
        ValueError: A name is unknown or in two groups, or a group is empty.

    >>> group_rows({"people": ["pick", "hps"]}, ["pick", "ocr", "hps"]).tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    groups = dict(groups or {})
    members = [name for group in groups.values() for name in group]
    check_known(members, reward_names, "groups")
    if twice := sorted({name for name in members if members.count(name) > 1}):
        raise ValueError(f"`groups` must hold a reward once. Found {', '.join(twice)} twice.")
    if empty := [name for name, group in groups.items() if not group]:
        raise ValueError(f"`groups` must hold at least one reward each. Found none in {', '.join(empty)}.")
    rows = [*groups.values(), *([name] for name in reward_names if name not in members)]
    return torch.tensor([[float(name in group) for name in reward_names] for group in rows], dtype=torch.float64)


def check_known(names: Iterable[str], reward_names: Sequence[str], option: str) -> None:
    """Check the names that an option uses.

    Raises:
        ValueError: A name is not one of `reward_names`.
    """
    if unknown := [name for name in names if name not in reward_names]:
        raise ValueError(
            f"`{option}` must use the names of the rewards: {', '.join(reward_names)}. Found {', '.join(unknown)}."
        )
