"""What a round logs about its scores, and what scoring leaves behind."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from balancers import WeightedSum
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.tinyworld import PROMPTS
from tests.helpers.small_rewards import Contrast
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Figures(Callback):
    """Keeps the figures of each round."""

    def __init__(self) -> None:
        self.of_rounds: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.of_rounds.append({name: float(value) for name, value in pl_module.round_metrics.items()})


def test_missing_scores_are_those_of_the_round(checkpoints, tmp_path, monkeypatch):
    class Picky(Contrast):
        def score(self, *, images, prompts):
            scores = super().score(images=images, prompts=prompts)
            return scores.index_fill(0, torch.tensor([0]), torch.nan)

    monkeypatch.setattr("tests.helpers.small_runs.Contrast", Picky)
    figures = Figures()
    run(checkpoints, tmp_path, WeightedSum(), rounds=2, callbacks=[figures])
    assert [figure["missing/contrast"] for figure in figures.of_rounds] == [1.0, 1.0]
    assert {figure[f"missing/{name}"] for figure in figures.of_rounds for name in ("bright", "red")} == {0.0}
    assert {figure["skipped/contrast"] for figure in figures.of_rounds} == {0.0}


def threads(at_most: int) -> int:
    """Number of threads, once those that are ending have ended."""
    deadline = time.monotonic() + 5
    while threading.active_count() > at_most and time.monotonic() < deadline:
        time.sleep(0.001)
    return threading.active_count()


def test_no_thread_of_a_reward_outlives_its_command(checkpoints, tmp_path):
    before = threading.active_count()
    module, _ = run(checkpoints, tmp_path, WeightedSum())
    data = PromptDataModule(str(PROMPTS), ["ocr", "geneval"], held_out_per_source=1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    for _ in range(3):
        (means,) = trainer.validate(module, datamodule=data, verbose=False)
        assert means["held_out/bright"] > 0 and module.scorer.seconds["bright"] > 0
    assert threads(at_most=before) == before
