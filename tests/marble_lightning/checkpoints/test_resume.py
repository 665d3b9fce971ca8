"""A run that was stopped at any moment resumes bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.results import read
from marble_lightning.lab import Run
from marble_lightning.lab.report.collect import collect
from marble_lightning.scoring.failures import RewardError
from tests.helpers import forks, stopped
from tests.helpers.command_line import differences, fit_with, last, options, state

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def uninterrupted(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    main(["fit", *options(checkpoints, folder)])
    return state(last(folder))


def stop(moments: list[str], runs: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Run in processes that are stopped at these moments; returns the exit status and the output of each."""
    outputs = [folder / f"output_{index}.txt" for index in range(len(runs))]
    statuses = forks.call(stopped.run_each, list(zip(moments, runs, map(str, outputs), strict=True)))
    return list(zip(statuses, (file.read_text() for file in outputs), strict=True))


KILLS = ["training", "writing"]
SLOW_KILLS = ["sampling", "linking"]
SIGNALS = {"SIGTERM in training": (143, 1), "SIGTERM in validation": (143, 2), "SIGINT": (130, 1)}
SLOW_SIGNALS = {"SIGTERM in sampling": (143, 1), "SIGHUP": (129, 1)}
"""Handled signals, with the exit status and the number of complete rounds."""


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def stops(checkpoints, tmp_path_factory):
    alone = ["SIGTERM before", "SIGINT twice", "SIGINT while evaluating", "SIGUSR1", "queued again"]
    return stopped_at([*KILLS, *SIGNALS, *alone], checkpoints, tmp_path_factory)


@pytest.fixture(scope="module")
def slow_stops(checkpoints, tmp_path_factory):
    return stopped_at([*SLOW_KILLS, *SLOW_SIGNALS, "SIGUSR1", "another job"], checkpoints, tmp_path_factory)


def stopped_at(moments, checkpoints, tmp_path_factory):
    """By moment: the folder, the exit status and the output of a run that was stopped then."""
    folders = {moment: tmp_path_factory.mktemp("stopped") for moment in moments}
    folders |= {later: folders["SIGUSR1"] for later in ("queued again", "another job") if later in moments}
    rarely, one = {"checkpoints.every_n_rounds": 10}, {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}
    more = dict.fromkeys([*SIGNALS, *SLOW_SIGNALS, "SIGUSR1"], rarely) | {"another job": one}
    commands = {"SIGINT while evaluating": "validate"}
    runs = [
        [commands.get(moment, "fit"), *options(checkpoints, folder, **more.get(moment, {}))]
        for moment, folder in folders.items()
    ]
    ended = stop(list(folders), runs, tmp_path_factory.mktemp("output"))
    return {moment: (folder, *result) for (moment, folder), result in zip(folders.items(), ended, strict=True)}


@pytest.mark.parametrize("moment", [*KILLS, *slow(SLOW_KILLS)])
def test_a_killed_run_resumes_bit_for_bit(checkpoints, uninterrupted, request, moment):
    folder, status, _ = request.getfixturevalue("stops" if moment in KILLS else "slow_stops")[moment]
    assert status == -9
    saved = state(last(folder))
    assert saved["epoch"] == 0  # the first round; the second was not finished, or not written, or not yet linked
    main(["fit", *options(checkpoints, folder), "--ckpt_path", "last"])
    assert differences(uninterrupted, state(last(folder, 1))) == []


def check_stop(stopped_runs: dict[str, Any], moment: str) -> Path:
    """The folder of a run that a signal has stopped."""
    folder, status, output = stopped_runs[moment]
    expected, rounds = (SIGNALS | SLOW_SIGNALS)[moment]
    assert status == expected, output
    checkpoint = folder / f"tiny/version_0/checkpoints/before_round_{rounds:04d}.ckpt"
    assert f"Stopped after {rounds} complete round(s). Resume from there: --ckpt_path {checkpoint}" in output
    assert last(folder).resolve() == checkpoint.resolve()
    return folder


@pytest.mark.parametrize("moment", SIGNALS)
def test_a_signal_leaves_a_checkpoint_of_the_rounds_beginning(stops, moment):
    check_stop(stops, moment)


@pytest.mark.parametrize("moment", ["SIGTERM in training", "SIGTERM in validation", *slow(["SIGINT", *SLOW_SIGNALS])])
def test_a_run_that_a_signal_stopped_resumes_bit_for_bit(checkpoints, uninterrupted, request, moment):
    folder = check_stop(request.getfixturevalue("stops" if moment in SIGNALS else "slow_stops"), moment)
    main(["fit", *options(checkpoints, folder), "--ckpt_path", str(last(folder))])
    assert differences(uninterrupted, state(last(folder, 1))) == []


def test_a_signal_during_the_evaluation_of_the_base_ends_the_run(stops):
    folder, status, _ = stops["SIGTERM before"]
    assert status == 143 and not list(folder.rglob("*.ckpt"))


def test_a_second_ctrl_c_ends_the_run_at_once(stops):
    folder, status, output = stops["SIGINT twice"]
    assert status == -signal.SIGINT and "Again ends it at once" in output and "Stopped after" not in output
    assert last(folder).resolve().name == "round_0000.ckpt"


def test_other_commands_than_fit_stop_too(stops):
    folder, status, output = stops["SIGINT while evaluating"]
    assert status == 130 and "Stopped by SIGINT before the end: no scores were written." in output
    assert not list(folder.rglob("results.json"))


def test_a_requeued_slurm_job_resumes_bit_for_bit(uninterrupted, stops):
    folder, status, output = stops["SIGUSR1"]
    checkpoint = folder / "tiny/version_0/checkpoints/before_round_0001.ckpt"
    assert status == 138 and f"Resume from there: --ckpt_path {checkpoint}" in output and "scontrol requeue 1\n" in output
    _, status, output = stops["queued again"]
    assert status == 0 and f"SLURM has queued this job again; it resumes from {checkpoint}." in output
    assert differences(uninterrupted, state(last(folder, 1))) == []
    parts = [folder / "tiny/version_0", folder / "tiny/version_1"]
    assert Run(parts[1]).folders == parts and collect([folder]).unfinished == []


@pytest.mark.slow
def test_another_job_begins_with_the_first_round(slow_stops):
    """Even if an earlier job has left a checkpoint."""
    folder, status, output = slow_stops["another job"]
    assert status == 0 and "resumes from" not in output and "Restored" not in output
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
    (checkpoint,) = (tmp_path / "tiny/version_0/checkpoints").glob("*round*")
    main(["fit", *options(checkpoints, tmp_path), "--ckpt_path", str(checkpoint)])
    assert differences(uninterrupted, state(last(tmp_path, 1))) == []


class ARewardFailsInSecondRound(Callback):
    """A reward raises an error while the second round is scored."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.rewards["jpeg"].score = self.die

    def die(self, *, images, prompts):
        raise ConnectionResetError("the reader is gone")


@pytest.mark.parametrize("balancer", ["MARBLE", pytest.param("WeightedSum", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_a_run_with_a_failed_reward_resumes_bit_for_bit(checkpoints, uninterrupted, tmp_path, caplog, balancer):
    """The base scores are also those of the uninterrupted run."""
    run = options(checkpoints, tmp_path, balancer=balancer, **{"model.scoring.retries": 0})
    whole = uninterrupted
    if balancer != "MARBLE":
        other = tmp_path / "whole"
        fit_with(options(checkpoints, other, balancer=balancer))
        whole = state(last(other))
    with pytest.raises(RewardError, match=r"`rewards\.jpeg` .*the reader is gone\. .*last checkpoint"):
        fit_with(run, ARewardFailsInSecondRound())
    newest = last(tmp_path).with_name("round_0000.ckpt")
    assert f"Stopped after 1 complete round(s). Resume from there: --ckpt_path {newest}" in caplog.text
    fit_with([*run, "--ckpt_path", "last"])
    assert differences(whole, state(last(tmp_path, 1))) == []


def user_callbacks(folder: Path) -> list[Callback]:
    """Callbacks that write checkpoints in the middle of a round, and after a validation."""
    steps = ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    validated = ModelCheckpoint(
        folder / "validated", "{epoch}", monitor="held_out/jpeg", mode="max", save_top_k=-1, save_on_train_epoch_end=False
    )
    return [steps, validated]


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_checkpoints_of_other_callbacks(checkpoints, tmp_path):
    """During a round they hold its beginning, and after its validation its end; both resume bit for bit.

    The results name the checkpoint of the round, not theirs.
    """
    two = {"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 1, "checkpoints.keep": -1}
    run = options(checkpoints, tmp_path, **two)
    fit_with(run, *user_callbacks(tmp_path / "whole"))
    assert read(tmp_path / "tiny/version_0")["evaluated"]["checkpoint"] == str(last(tmp_path).resolve())
    rounds = [state(last(tmp_path).with_name(f"round_{index:04d}.ckpt")) for index in range(2)]
    for index in range(2):
        assert differences(rounds[index], state(tmp_path / f"whole/validated/epoch={index}.ckpt")) == []
    for version, (step, beginning) in enumerate([(1, 0), (4, 2)], start=1):  # in the first round and in the second
        middle = tmp_path / f"whole/steps/step={step}.ckpt"
        assert state(middle)["global_step"] == beginning
        fit_with([*run, "--ckpt_path", str(middle)], *user_callbacks(tmp_path / f"again_{version}"))
        assert differences(rounds[1], state(last(tmp_path, version))) == []


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
@pytest.mark.parametrize(
    ("every", "kept"),
    [
        (2, [bytes, bytes, Path]),
        *(
            pytest.param(every, kept, marks=pytest.mark.slow)
            for every, kept in ((1, [bytes, Path, Path]), (10, [bytes] * 3))
        ),
    ],
)
def test_a_rounds_beginning_is_kept_in_memory_only_without_a_file_of_it(checkpoints, tmp_path, every, kept):
    class Kept(Callback):
        def __init__(self):
            self.types = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.types.append(bytes if isinstance(pl_module.round_start._state, bytes) else Path)

    recorded = Kept()
    fit_with(options(checkpoints, tmp_path, **{"checkpoints.every_n_rounds": every}), recorded)
    assert recorded.types == kept
    files = sorted(file.name for file in last(tmp_path).parent.iterdir())
    assert last(tmp_path).resolve().name == "round_0002.ckpt" and state(last(tmp_path))["global_step"] == 6
    assert every != 2 or files == ["last.ckpt", "round_0001.ckpt", "round_0002.ckpt"]  # the last round's at any interval
