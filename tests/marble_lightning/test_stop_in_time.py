"""Lightning's EarlyStopping and ModelCheckpoint go by held-out scores, end to end."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Callback

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.evaluator import Evaluator
from marble_lightning.evaluation.results import read
from tests.helpers.command_line import fit_with, options, state

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]

NAME = "held_out/jpeg"
STOPPING = {"class_path": "EarlyStopping", "init_args": {"monitor": NAME, "mode": "max", "patience": 1}}
BEST = {"class_path": "ModelCheckpoint", "init_args": {"monitor": NAME, "mode": "max", "filename": "best"}}


class Recorder(Callback):
    def on_fit_end(self, trainer, pl_module):
        self.step = trainer.global_step


@pytest.fixture
def falling(monkeypatch):
    """Held-out scores that fall by 1 with each evaluation after the first of the trained policy."""
    finish, count = Evaluator.finish, iter(range(100))

    def fallen(self, trainer):
        means = finish(self, trainer)
        return means if trainer.state.fn != "fit" or trainer.sanity_checking else means | {NAME: -float(next(count))}

    monkeypatch.setattr(Evaluator, "finish", fallen)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_run_stops_and_the_best_checkpoint_is_kept(checkpoints, tmp_path, falling, capsys, every):
    more = {"trainer.max_epochs": 4 * every, "trainer.check_val_every_n_epoch": every}
    run = options(checkpoints, tmp_path, **more, **{"trainer.callbacks": json.dumps([STOPPING, BEST])})
    recorder = Recorder()
    fit_with(run, recorder)
    shown, folder = capsys.readouterr().out, tmp_path / "tiny/version_0"
    best = folder / "checkpoints/best.ckpt"
    assert recorder.step == 2 * every * 2  # the second evaluation is no better; a round has two optimizer steps
    assert state(best)["global_step"] == every * 2
    assert f"Stopped:        Monitored metric {NAME} did not improve in the last 1 records." in shown
    assert f"Best {NAME}: marble-lightning validate -c {folder}/config.yaml --ckpt_path {best}\n" in shown
    assert read(folder)["evaluated"]["optimizer_step"] == recorder.step
    main(["validate", *run, "--ckpt_path", str(best)])
    assert read(tmp_path / "tiny/version_1")["evaluated"]["optimizer_step"] == every * 2


def test_results_of_a_run_that_stops_between_evaluations(checkpoints, tmp_path, caplog):
    """A training score can stop a run in a round that is not evaluated; its results are those of the last evaluation."""
    stopping = {"monitor": "train/jpeg", "mode": "max", "patience": 2, "min_delta": 1.0, "check_on_train_epoch_end": True}
    callbacks = json.dumps([{"class_path": "EarlyStopping", "init_args": stopping}])
    more = {"trainer.max_epochs": 4, "trainer.check_val_every_n_epoch": 2, "trainer.callbacks": callbacks}
    main(["fit", *options(checkpoints, tmp_path, **more)])
    evaluated = read(tmp_path / "tiny/version_0")["evaluated"]
    assert evaluated["optimizer_step"] == 4 and evaluated["checkpoint"].endswith("round_0001.ckpt")
    assert "the last evaluation, after optimizer step 4. The run stopped after step 6" in caplog.text


def test_a_metric_that_falls_is_reported(checkpoints, tmp_path, monkeypatch, caplog):
    finish = Evaluator.finish

    def exploit(self, trainer):
        means = finish(self, trainer)
        if not trainer.sanity_checking:
            for index, name in enumerate(self.reward_models):
                self.trained_scores[:, index] = self.base_scores[:, index] + (-0.5 if name == "metric" else 0.5)
        return means

    monkeypatch.setattr(Evaluator, "finish", exploit)
    more = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "model.metrics": "{metric: JPEGCompressibility}"}
    main(["fit", *options(checkpoints, tmp_path, **more)])
    assert "Round 0: held_out/metric has fallen below the base's by 0.5 ± " in caplog.text
