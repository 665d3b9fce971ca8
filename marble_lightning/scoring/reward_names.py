"""Names of rewards and metrics; they become names of modules, curves, columns and files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from rewards import Reward

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def named_rewards(setting: str, rewards: Mapping[str, Reward | None]) -> dict[str, Reward]:
    """Check the names of a setting's rewards, and leave out rewards that a later configuration has set to null.

    Args:
        setting: `rewards` or `metrics`, for the error message.
        rewards: By name.

    Raises:
        ValueError: A name is not made of letters, digits, _ and -, or is an attribute of `torch.nn.ModuleDict`, which holds
            the rewards.
    """
    module_dict = nn.ModuleDict()
    for name in rewards:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Names in `{setting}` must be letters, digits, _ and -, the first one a letter: they name curves, columns "
                f"and files. Found {name!r}."
            )
        if hasattr(module_dict, name):
            raise ValueError(
                f"Names in `{setting}` must not be those of an attribute of torch.nn.ModuleDict. Found {name!r}; "
                f"try {f'{name}_score'!r}."
            )
    return {name: reward for name, reward in rewards.items() if reward is not None}
