"""Finished runs for reports."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.finished_runs import finish


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods, of which the second neglects the second reward, with three seeds, and two specialists of each reward."""
    folder = tmp_path_factory.mktemp("finished")
    for seed in range(3):
        finish(folder / "fair" / f"seed_{seed}" / "version_0", seed, (0.2, 0.1))
        finish(folder / "greedy" / f"seed_{seed}" / "version_0", seed, (0.4, 0.0))
    for seed in range(2):
        finish(folder / "only" / f"ocr_{seed}", seed, (0.4, -0.1), ("ocr",))
        finish(folder / "only" / f"geneval_{seed}", seed, (0.0, 0.2), ("geneval",))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of these runs, which a test may change."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
