"""A run that was stopped at any moment goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from marble_lightning.cli import QUIET, main
from marble_lightning.scoring.failures import RewardError
from tests.helpers import ROOT, stopped
from tests.helpers.command_line import differences, fit_with, last, options, state


@pytest.fixture(scope="module")
def uninterrupted(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["marble-lightning"])
        main(["fit", *options(checkpoints, folder)])
    return state(last(folder))


def stop(moments: list[str], runs: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Run in processes that are stopped at these moments; returns the exit status of each and what it said."""
    said = [folder / f"said_{index}.txt" for index in range(len(runs))]
    wanted = json.dumps([(moment, run, str(file)) for moment, run, file in zip(moments, runs, said, strict=True)])
    ended = subprocess.run(
        [sys.executable, stopped.__file__, wanted], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return list(zip(json.loads(ended.stdout), (file.read_text() for file in said), strict=True))


KILLS = ["training", "writing"]
SLOW_KILLS = ["sampling", "linking"]
SIGNALS = {"SIGTERM in training": (143, 1), "SIGTERM in validation": (143, 2), "SIGINT": (130, 1)}
SLOW_SIGNALS = {"SIGTERM in sampling": (143, 1), "SIGHUP": (129, 1)}
"""Stops that are handled, with the exit status they end with, and after how many whole rounds."""


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def stops(checkpoints, tmp_path_factory):
    alone = ["SIGTERM before", "SIGINT twice", "SIGINT while judging", "SIGUSR1", "queued again"]
    return stopped_at([*KILLS, *SIGNALS, *alone], checkpoints, tmp_path_factory)


@pytest.fixture(scope="module")
def slow_stops(checkpoints, tmp_path_factory):
    return stopped_at([*SLOW_KILLS, *SLOW_SIGNALS, "SIGUSR1", "another job"], checkpoints, tmp_path_factory)


def stopped_at(moments, checkpoints, tmp_path_factory):
    """By moment: the folder of a run that was stopped then, its exit status and what it said."""
    folders = {moment: tmp_path_factory.mktemp("stopped") for moment in moments}
    folders |= {later: folders["SIGUSR1"] for later in ("queued again", "another job") if later in moments}
    rarely, one = {"checkpoints.every_n_rounds": 10}, {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}
    more = dict.fromkeys([*SIGNALS, *SLOW_SIGNALS, "SIGUSR1"], rarely) | {"another job": one}
    commands = {"SIGINT while judging": "validate"}
    runs = [
        [commands.get(moment, "fit"), *options(checkpoints, folder, **more.get(moment, {}))]
        for moment, folder in folders.items()
    ]
    ended = stop(list(folders), runs, tmp_path_factory.mktemp("said"))
    return {moment: (folder, *each) for (moment, folder), each in zip(folders.items(), ended, strict=True)}


@pytest.mark.parametrize("moment", [*KILLS, *slow(SLOW_KILLS)])
def test_a_killed_run_goes_on_bit_for_bit(checkpoints, uninterrupted, request, moment):
    folder, status, _ = request.getfixturevalue("stops" if moment in KILLS else "slow_stops")[moment]
    assert status == -9
    left = state(last(folder))
    assert left["epoch"] == 0  # the first round; the second was not finished, or not written, or not yet linked
    main(["fit", *options(checkpoints, folder), "--ckpt_path", "last"])
    assert differences(uninterrupted, state(last(folder, 1))) == []


@pytest.mark.parametrize("moment", [*SIGNALS, *slow(SLOW_SIGNALS)])
def test_a_signal_leaves_a_checkpoint_of_the_rounds_beginning(checkpoints, uninterrupted, request, moment):
    folder, status, said = request.getfixturevalue("stops" if moment in SIGNALS else "slow_stops")[moment]
    expected, rounds = (SIGNALS | SLOW_SIGNALS)[moment]
    assert status == expected, said
    left = folder / f"tiny/version_0/checkpoints/before_round_{rounds:04d}.ckpt"
    assert f"Stopped after {rounds} complete round(s). Resume from there: --ckpt_path {left}" in said
    assert last(folder).resolve() == left.resolve()
    main(["fit", *options(checkpoints, folder), "--ckpt_path", str(last(folder))])
    assert differences(uninterrupted, state(last(folder, 1))) == []


def test_a_signal_while_the_base_is_measured_ends_the_run(stops):
    folder, status, _ = stops["SIGTERM before"]
    assert status == 143 and not list(folder.rglob("*.ckpt"))


def test_a_second_ctrl_c_ends_the_run_at_once(stops):
    folder, status, said = stops["SIGINT twice"]
    assert status == -signal.SIGINT and "Again ends it at once" in said and "Stopped after" not in said
    assert last(folder).resolve().name == "round_0000.ckpt"


def test_what_is_not_fit_stops_too(stops):
    folder, status, said = stops["SIGINT while judging"]
    assert status == 130 and "Stopped by SIGINT before the end: no scores were written." in said
    assert not list(folder.rglob("results.json"))


def test_a_job_that_slurm_queues_again_goes_on_bit_for_bit(uninterrupted, stops):
    folder, status, said = stops["SIGUSR1"]
    left = folder / "tiny/version_0/checkpoints/before_round_0001.ckpt"
    assert status == 138 and f"Resume from there: --ckpt_path {left}" in said and "scontrol requeue 1\n" in said
    _, status, said = stops["queued again"]
    assert status == 0 and f"SLURM has queued this job again; it resumes from {left}." in said
    assert differences(uninterrupted, state(last(folder, 1))) == []


@pytest.mark.slow
def test_another_job_begins_with_the_first_round(slow_stops):
    """Whatever an earlier one has left."""
    folder, status, said = slow_stops["another job"]
    assert status == 0 and "resumes from" not in said and "Restored" not in said
    assert state(last(folder, 1))["epoch"] == 0


class AtRoundsEnd(Callback):
    """Sends a signal between two rounds."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_a_signal_between_two_rounds(checkpoints, uninterrupted, tmp_path):
    with pytest.raises(SystemExit):
        fit_with(options(checkpoints, tmp_path, **{"checkpoints.every_n_rounds": 10}), AtRoundsEnd())
    (left,) = (tmp_path / "tiny/version_0/checkpoints").glob("*round*")
    main(["fit", *options(checkpoints, tmp_path), "--ckpt_path", str(left)])
    assert differences(uninterrupted, state(last(tmp_path, 1))) == []


class ARewardFailsInSecondRound(Callback):
    """Its scorer dies while the round is being scored."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.rewards["jpeg"].score = self.die

    def die(self, *, images, prompts):
        raise ConnectionResetError("the reader is gone")


@pytest.mark.parametrize("balancer", ["MARBLE", pytest.param("WeightedSum", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_a_run_whose_reward_failed_goes_on_bit_for_bit(checkpoints, tmp_path, caplog, balancer):
    """And its table compares with the base's scores, which are those of the first run."""
    run = options(checkpoints, tmp_path, balancer=balancer, **{"model.scoring.retries": 0})
    fit_with(run)
    with pytest.raises(RewardError, match=r"`rewards\.jpeg` .*the reader is gone\. .*last checkpoint"):
        fit_with(run, ARewardFailsInSecondRound())
    newest = last(tmp_path, 1).with_name("round_0000.ckpt")
    assert f"Stopped after 1 complete round(s). Resume from there: --ckpt_path {newest}" in caplog.text
    fit_with([*run, "--ckpt_path", "last"])
    assert differences(state(last(tmp_path)), state(last(tmp_path, 2))) == []


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_a_base_that_was_measured_otherwise_is_measured_again(checkpoints, tmp_path):
    """As the base, not as the policy that the run goes on from."""
    one = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}
    main(["fit", *options(checkpoints, tmp_path, **one)])
    otherwise = one | {"model.evaluation.steps": 3}
    main(["fit", *options(checkpoints, tmp_path, **otherwise)])
    base = state(last(tmp_path, 1))["base_scores"]
    more = options(checkpoints, tmp_path, **otherwise | {"trainer.max_epochs": 2})
    main(["fit", *more, "--ckpt_path", str(last(tmp_path))])
    assert differences(base, state(last(tmp_path, 2))["base_scores"]) == []


def theirs(folder: Path) -> list[Callback]:
    """Checkpoints in the middle of a round, and when a validation has ended."""
    steps = ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    judged = ModelCheckpoint(
        folder / "judged", "{epoch}", monitor="held_out/jpeg", save_top_k=-1, save_on_train_epoch_end=False
    )
    return [steps, judged]


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_what_a_checkpoint_of_the_users_holds(checkpoints, tmp_path):
    """In the middle of a round its beginning; when it has been judged its end. A run goes on from either bit for bit."""
    run = options(checkpoints, tmp_path, **{"trainer.check_val_every_n_epoch": 1, "checkpoints.keep": -1})
    fit_with(run, *theirs(tmp_path / "whole"))
    rounds = [state(last(tmp_path).with_name(f"round_{index:04d}.ckpt")) for index in range(3)]
    for index in range(3):
        assert differences(rounds[index], state(tmp_path / f"whole/judged/epoch={index}.ckpt")) == []
    for version, (step, beginning) in enumerate([(1, 0), (4, 2)], start=1):  # of the first round, and of the second
        middle = tmp_path / f"whole/steps/step={step}.ckpt"
        assert state(middle)["global_step"] == beginning
        fit_with([*run, "--ckpt_path", str(middle)], *theirs(tmp_path / f"again_{version}"))
        assert differences(rounds[2], state(last(tmp_path, version))) == []
