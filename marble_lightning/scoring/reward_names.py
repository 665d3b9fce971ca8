"""Names of rewards and metrics; they become names of curves, columns and files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from marble_lightning.utils.validation import require
from rewards import Reward

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def named_rewards(setting: str, rewards: Mapping[str, Reward | None]) -> dict[str, Reward]:
    """Check the names of a setting's rewards, and leave out rewards that a later configuration has set to null.

    Args:
        setting: `rewards` or `metrics`, for the error message.
        rewards: By name.

    Raises:
        ValueError: A name is not made of letters, digits, _ and -.
    """
    for name in rewards:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Names in `{setting}` must be letters, digits, _ and -, the first one a letter: they name curves, columns "
                f"and files. Found {name!r}."
            )
    return {name: reward for name, reward in rewards.items() if reward is not None}


def rewards_and_metrics(
    rewards: Mapping[str, Reward | None], metrics: Mapping[str, Reward | None]
) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """Rewards and metrics without those set to null.

    Raises:
        ValueError: A name is wrong or in both, or there is no reward.
    """
    learned, only_scored = named_rewards("rewards", rewards), named_rewards("metrics", metrics)
    require(bool(learned), "`rewards` must name at least one reward", "none; the configuration `tiny` has five")
    if twice := set(learned) & set(only_scored):
        raise ValueError(f"`metrics` must not use the name of a reward. Found {', '.join(sorted(twice))} in both.")
    return learned, only_scored
