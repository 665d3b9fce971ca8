"""How paths in settings are resolved."""

from pathlib import Path

import pytest

from rewards import CLIPScore
from rewards.files import resolve_path
from tests.helpers import ROOT

BUNDLED = ROOT / "marble_lightning/tinyworld"


def test_a_package_path_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_path("package:tinyworld")).samefile(BUNDLED)


def test_a_path_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("~/weights") == "/home/someone/weights"


@pytest.mark.parametrize("path", ["prompts", "/prompts", "xswu/HPSv2", "./package:x"])
def test_other_paths_are_unchanged(path):
    assert resolve_path(path) == path


def test_the_identity_keeps_the_package_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = CLIPScore("package:tinyworld/weights/clipscore")
    reward.setup()
    assert reward.identity["path"] == "package:tinyworld/weights/clipscore"


def test_missing_weights_in_the_package_are_refused():
    with pytest.raises(FileNotFoundError, match="marble_lightning/tinyworld/weights/none"):
        CLIPScore("package:tinyworld/weights/none").setup()
