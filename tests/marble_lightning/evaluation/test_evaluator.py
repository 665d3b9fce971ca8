"""Scoring of held-out images while the next ones are sampled."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.evaluator import Evaluator
from marble_lightning.evaluation.results import read
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from rewards import Prompt
from tests.helpers.command_line import options
from tests.helpers.small_rewards import Brightness

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


@pytest.mark.integration
def test_a_batch_is_scored_while_the_next_is_sampled(checkpoints, tmp_path, monkeypatch):
    """Scores and images are the same, bit for bit."""
    calls = []

    def record(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given, **named: (calls.append(name), real(self, *given, **named))[1])

    record(Evaluator, "sample")
    record(Scorer, "submit")
    record(Scorer, "collect")
    runs = {}
    for overlap in ("false", "true"):
        more: dict[str, Any] = {"data.held_out_batch_size": 2, "model.scoring.overlap": overlap}
        main(["validate", *options(checkpoints, tmp_path, **more), "--trainer.logger.version", overlap])
        folder = tmp_path / "tiny" / overlap
        runs[overlap] = (read(folder)["prompts"], (folder / "held_out.png").read_bytes())
    assert runs["true"] == runs["false"] and len(runs["true"][0]) == 6
    in_turns = ["sample", "submit", "collect"] * 3
    overlapped = ["sample", *["submit", "sample", "collect"] * 2, "submit", "collect"]
    assert calls == in_turns + overlapped


@pytest.mark.integration
def test_only_the_transformer_runs_in_the_precision_of_the_trainer(checkpoints, tmp_path, monkeypatch):
    """As in training; the cache of prompts serves both."""
    found = defaultdict(set)

    def record(name):
        real = getattr(SD3Policy, name)

        def recorded(*given, **named):
            found[name].add(torch.is_autocast_enabled("cpu"))
            return real(*given, **named)

        monkeypatch.setattr(SD3Policy, name, recorded)

    for name in ("encode", "velocity", "decode"):
        record(name)
    one = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "trainer.precision": "bf16-mixed"}
    main(["fit", *options(checkpoints, tmp_path, **one)])
    assert found == {"encode": {False}, "velocity": {True}, "decode": {False}}


def test_batches_that_are_sampled_ahead(monkeypatch):
    """This rank's next batch, unless it is not evaluated, not encoded, or the run is about to stop; none if sharded."""
    data = PromptDataModule("package:tinyworld/prompts", ["ocr"], prompts_per_round=1, held_out_batch_size=2)
    data.held_out = [Prompt(str(index), "ocr") for index in range(10)]
    monkeypatch.setattr("marble_lightning.evaluation.evaluator.get_datamodule", lambda trainer: data)
    trainer: Any = SimpleNamespace(
        world_size=2, state=SimpleNamespace(stage=RunningStage.PREDICTING), num_predict_batches=[3]
    )
    policy: Any = SimpleNamespace(sharded=False)

    def ahead(evaluator, first, index):
        batch = [(number, data.held_out[number]) for number in (first, first + 2)]
        return [number for number, _ in evaluator._to_sample_ahead(trainer, batch, index)]

    evaluator = Evaluator(policy, Scorer({"bright": Brightness()}, Scoring()), Evaluation(), 0, policy)
    evaluator.encoded = dict.fromkeys("012345678", None)
    assert [ahead(evaluator, 1, 0), ahead(evaluator, 0, 0), ahead(evaluator, 4, 1)] == [[5, 7], [4, 6], [8]]
    assert ahead(evaluator, 5, 1) == []  # 9 is not encoded
    trainer.num_predict_batches = [2]
    assert ahead(evaluator, 4, 1) == []
    evaluator.scorer.stopping = lambda: True
    assert ahead(evaluator, 0, 0) == []
    in_turns = Evaluator(policy, Scorer({"bright": Brightness()}, Scoring(overlap=False)), Evaluation(), 0, policy)
    together = Evaluator(SimpleNamespace(sharded=True), Scorer({"bright": Brightness()}, Scoring()), Evaluation(), 0, policy)  # type: ignore[arg-type]
    in_turns.encoded = together.encoded = evaluator.encoded
    assert ahead(in_turns, 0, 0) == ahead(together, 0, 0) == []
