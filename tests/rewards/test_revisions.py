"""Which commit of a hub repository is read."""

import pytest

from rewards import CLIPScore, HPSv2, ImageReward, PickScore
from rewards.files import PINNED


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What is looked up on a hub that cannot be reached."""
    found: list[tuple[str, str | None]] = []

    def unreachable(path: str, *arguments: str, revision: str | None = None, **options: object) -> None:
        found.append((path, revision))
        raise OSError("no network")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    return found


@pytest.mark.parametrize("reward", [PickScore(), HPSv2(), CLIPScore(), ImageReward()])
def test_published_weights_are_pinned(reward, asked) -> None:
    with pytest.raises(FileNotFoundError, match="no network"):
        reward.setup()
    assert asked == [(reward.path, PINNED[reward.path])]
    assert len(PINNED[reward.path]) == 40


def test_a_revision_of_ones_own_comes_first(asked) -> None:
    with pytest.raises(FileNotFoundError):
        CLIPScore(revision="main").setup()
    assert asked == [("openai/clip-vit-large-patch14", "main")]


def test_what_is_not_known_is_read_at_its_main_branch(asked) -> None:
    with pytest.raises(FileNotFoundError):
        CLIPScore("someone/their-clip").setup()
    assert asked == [("someone/their-clip", None)]
