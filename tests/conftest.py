"""Small checkpoints in the real formats, made once per test session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a file of tests on each core, not all on all

import pytest

from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer
from tests.small_checkpoints import save_small_clip, small_pipeline

LONG = ["test_resume", "test_evaluation", "test_cli", "test_checkpoints", "test_processes", "test_configs", "test_notebooks"]
"""Files of tests that take a minute or so: whoever is given one last would keep the others waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random checkpoints: `sd3` and `sd3_t5`, pipelines for 16 x 16 pixels, and `clip`, a CLIPModel."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(folder / "tokenizer", seed=0)
    small_pipeline(tokenizer).save_pretrained(folder / "sd3")
    small_pipeline(tokenizer, with_t5=True).save_pretrained(folder / "sd3_t5")
    save_small_clip(folder / "clip", tokenizer)
    return folder


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when it is given arguments in Python while the program has some of its own."""
    monkeypatch.setattr("sys.argv", ["marble-lightning"])


@pytest.fixture
def small(checkpoints: Path, tmp_path: Path) -> list[str]:
    """Command-line options that run configs/tiny.yaml on the random checkpoints, small, writing to `tmp_path`."""
    return small_options(checkpoints, tmp_path)


def small_options(checkpoints: Path, folder: Path) -> list[str]:
    """What the fixture `small` gives, writing to any folder."""
    root = Path(__file__).parent.parent
    clip = str(checkpoints / "clip")
    options = {
        "trainer.logger.save_dir": folder,
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 2,
        "trainer.enable_progress_bar": False,
        "data.folder": root / "marble_lightning/tinyworld/prompts",
        "data.prompts_per_round": 6,
        "data.images_per_prompt": 4,
        "data.held_out_per_source": 2,
        "data.held_out_images": 1,
        "model.policy.path": checkpoints / "sd3",
        "model.policy.resolution": 16,
        "model.policy.rank": 2,
        "model.rewards.pickscore.path": clip,
        "model.rewards.hpsv2.path": clip,
        "model.rewards.clipscore.path": clip,
        "model.sampling.steps": 4,
        "model.sampling.times_per_image": 2,
        "model.sampling.batch_size": 12,
        "model.evaluation.steps": 2,
        "model.micro_batch_size": 8,
        "model.optimizer_steps_per_round": 1,
        "memory.check": "off",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-c", str(root / "configs/tiny.yaml"), *flags]
