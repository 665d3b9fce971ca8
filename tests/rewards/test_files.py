"""What a path in a setting means."""

from pathlib import Path

import pytest

from rewards import CLIPScore
from rewards.files import resolve_path
from tests.helpers import ROOT

BUNDLED = ROOT / "marble_lightning/tinyworld"


def test_a_path_in_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_path("package:tinyworld")).samefile(BUNDLED)


def test_a_path_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("~/weights") == "/home/someone/weights"


@pytest.mark.parametrize("path", ["prompts", "/prompts", "xswu/HPSv2", "./package:x"])
def test_all_else_stays(path):
    assert resolve_path(path) == path


def test_a_reward_keeps_the_name_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = CLIPScore("package:tinyworld/weights/clipscore")
    reward.setup()
    assert reward.identity["path"] == "package:tinyworld/weights/clipscore"


def test_weights_that_the_package_does_not_have():
    with pytest.raises(FileNotFoundError, match="marble_lightning/tinyworld/weights/none"):
        CLIPScore("package:tinyworld/weights/none").setup()
