"""Small checkpoints in the real formats, made once per test session.

Fixtures import what they use: the process that hands out the tests needs none of it, nor do tests of one package.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a file of tests on each core, not all on all

import pytest
from xdist.scheduler import LoadFileScheduling

gc.disable()  # until all tests are imported: what is imported is not garbage

LONG = [
    "test_resume", "test_evaluation", "test_notebooks", "test_estimate", "test_signal_gram", "test_resume_checks",
    "test_processes", "test_module", "test_cli", "test_examples", "test_trackers", "test_method_tables", "test_run_folder",
    "test_gradient_alignment", "test_image_drift", "test_checkpoints", "test_configs", "test_wheel", "test_family",
    "test_qp", "test_ocr", "test_z_image_runs", "test_stop_in_time", "test_collectives",
]  # fmt: skip
"""Files of tests that take about a minute. They start first, so that no process ends with a long one."""


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests wait for files, servers and child processes for a tenth of their time."""
    return (os.cpu_count() or 1) + 1


class Scheduler(LoadFileScheduling):
    """A file of tests on each core, but for the notebooks, which share nothing."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "::test_it_runs_in_fast_mode" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # collections need not search what was imported in every test
    gc.set_threshold(5_000, 20, 20)  # runs make many short-lived objects; a collection for every 700 takes 3 % of the time
    if forks := sys.modules.get("tests.helpers.forks"):  # some test may call it
        forks.prepare()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random checkpoints: `sd3` and `sd3_t5`, pipelines for 16 x 16 pixels, and `clip`, a CLIPModel."""
    from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer
    from tests.helpers.small_checkpoints import save_small_clip, small_pipeline

    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(folder / "tokenizer", seed=0)
    small_pipeline(tokenizer).save_pretrained(folder / "sd3")
    small_pipeline(tokenizer, with_t5=True).save_pretrained(folder / "sd3_t5")
    save_small_clip(folder / "clip", tokenizer)
    return folder


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random ZImagePipeline for 16 x 16 pixels."""
    from tests.helpers.small_z_image import small_z_image

    folder = tmp_path_factory.mktemp("checkpoints") / "z_image"
    small_z_image().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_arguments() -> Iterator[None]:
    """LightningCLI warns when it is given arguments in Python while the program has some of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["marble-lightning"])
        yield


@pytest.fixture
def small(checkpoints: Path, tmp_path: Path) -> list[str]:
    """Command-line options that run configs/tiny.yaml on the random checkpoints, small, writing to `tmp_path`."""
    from tests.helpers.command_line import small_options

    return small_options(checkpoints, tmp_path)
