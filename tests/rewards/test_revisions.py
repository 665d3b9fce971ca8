"""Which commit of a hub repository is used."""

import pytest

from rewards import CLIPScore, HPSv2, ImageReward, Mask2Former, PickScore
from rewards.files import PINNED


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """(path, revision) pairs requested from a hub that cannot be reached."""
    requests: list[tuple[str, str | None]] = []

    def unreachable(path: str, *arguments: str, revision: str | None = None, **options: object) -> None:
        requests.append((path, revision))
        raise OSError("no network")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    return requests


@pytest.mark.parametrize("reward", [PickScore(), HPSv2(), CLIPScore(), ImageReward(), Mask2Former()])
def test_published_weights_are_pinned(reward, lookups, monkeypatch) -> None:
    monkeypatch.setattr("rewards.geneval.colours.ColourClassifier.setup", lambda self: None)
    with pytest.raises(FileNotFoundError, match="no network"):
        reward.setup()
    assert lookups == [(reward.path, PINNED[reward.path])]
    assert len(PINNED[reward.path]) == 40


def test_a_given_revision_takes_precedence(lookups) -> None:
    with pytest.raises(FileNotFoundError):
        CLIPScore(revision="main").setup()
    assert lookups == [("openai/clip-vit-large-patch14", "main")]


def test_unknown_repositories_use_their_main_branch(lookups) -> None:
    with pytest.raises(FileNotFoundError):
        CLIPScore("someone/their-clip").setup()
    assert lookups == [("someone/their-clip", None)]
