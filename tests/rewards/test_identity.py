"""Which settings of a reward its identity has."""

from __future__ import annotations

from typing import Any

import pytest

from rewards import HPSv2, HPSv3, ImageReward, PickScore, Reward


@pytest.mark.parametrize(
    ("reward", "name"),
    [(PickScore, "processor_path"), (HPSv2, "processor_path"), (ImageReward, "tokenizer_path"), (HPSv3, "base_path")],
)
def test_files_beside_the_weights_are_named_if_they_are_not_the_default(reward: type[Reward], name: str) -> None:
    """Results from before have no such names, so the default and null, the folder of the weights, are left out."""

    def identity(**options: Any) -> dict[str, str]:
        return reward(**options).identity

    assert identity(**{name: "mine/files"}) == identity() | {name: "mine/files"}
    assert name not in identity()


@pytest.mark.parametrize("reward", [PickScore, HPSv2])
def test_the_folder_of_the_weights_is_not_named_twice(reward: type[Reward]) -> None:
    assert "processor_path" not in reward("package:weights", processor_path=None).identity


def test_an_attribute_that_is_missing_is_left_out() -> None:
    class Mine(PickScore):
        identity_defaults = {"size": 3}  # noqa: RUF012

    assert Mine().identity.keys() == PickScore().identity.keys()
