"""Signals: common checks of processes, handlers, and exit statuses."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from balancers import WeightedSum
from marble_lightning import trainer_commands
from marble_lightning.checkpoints import signals
from marble_lightning.checkpoints.signals import MICRO_BATCHES, Stopped, Stops, status
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.scoring.settings import Scoring
from tests.helpers.small_rewards import Brightness
from tests.helpers.small_runs import run


class Strategy:
    """Reduces over this process and one other, and counts the reductions."""

    root_device = torch.device("cpu")

    def __init__(self, other: int = 0) -> None:
        self.other, self.calls = other, 0

    def reduce(self, value, reduce_op):
        self.calls += 1
        assert reduce_op == "max"
        return torch.maximum(value, torch.tensor(float(self.other)))


def trainer(world_size: int, per_step: int, strategy: Strategy, fn: str = "fit"):
    return SimpleNamespace(
        world_size=world_size, accumulate_grad_batches=per_step, strategy=strategy, lightning_module=None, current_epoch=3,
        state=SimpleNamespace(fn=fn), _accelerator_connector=SimpleNamespace(cluster_environment=None),
    )  # fmt: skip


@pytest.fixture
def handlers():
    """Restores the handlers of signals."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("world_size", "per_step", "collectives"), [(2, 4, 24 // 4), (2, 24, 24 // MICRO_BATCHES), (2, 1, 24), (1, 4, 0)]
)
def test_processes_check_together_every_few_micro_batches(world_size, per_step, collectives):
    """A common check makes the device wait; a single process needs none."""
    strategy = Strategy()
    for index in range(24):
        Stops().on_train_batch_start(trainer(world_size, per_step, strategy), None, None, index)
    assert strategy.calls == collectives


def test_several_processes_wait_for_each_other_before_they_communicate(monkeypatch):
    waits, strategy = [], Strategy()
    monkeypatch.setattr(signals, "wait_for_ranks", lambda *arguments: waits.append((*arguments, strategy.calls)))
    for world_size in (1, 2):
        Stops().on_train_batch_start(trainer(world_size, 1, strategy), None, None, 0)
    assert waits == [(strategy, "micro-batches of round 3", 0)]


def test_all_processes_stop_at_the_same_micro_batch():
    """Whichever process received the signal."""
    stopped = []
    for requested, other in ((0, 1000 + signal.SIGTERM), (1000 + signal.SIGTERM, 0)):
        stops, strategy = Stops(), Strategy()
        for index in range(24):
            if index == 9:
                stops.requested, strategy.other = requested, other
            try:
                stops.on_train_batch_start(trainer(2, 24, strategy), None, None, index)
            except Stopped as end:
                stopped.append((index, status(end)))
                break
    assert stopped == [(16, 143), (16, 143)]


def test_a_single_process_stops_before_the_next_micro_batch():
    stops = Stops()
    stops.requested = 1000 + signal.SIGHUP
    with pytest.raises(Stopped) as end:
        stops.on_train_batch_start(trainer(1, 24, Strategy()), None, None, 5)
    assert status(end.value) == 129


def test_a_signal_that_ends_the_run_takes_precedence_over_requeueing():
    stops = Stops()
    stops.requested = signal.SIGUSR1
    with pytest.raises(Stopped) as end:
        stops.stop_if_requested(trainer(2, 1, Strategy(1000 + signal.SIGHUP)), "a test")
    assert (end.value.signal, end.value.requeue) == (signal.SIGHUP, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_handlers_only_record_a_signal(handlers, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` would ignore it, and an ignored signal stays ignored
    stops = Stops()
    stops.on_train_start(trainer(1, 1, Strategy()), None)
    os.kill(os.getpid(), number)
    assert stops.requested == 1000 + number
    # the second Ctrl-C has the default handler, so that it also ends a process that waits for another one
    assert (signal.getsignal(signal.SIGINT) is signal.SIG_DFL) == (number == signal.SIGINT)


def test_ignored_signals_stay_ignored(handlers):
    """As under nohup, and for a background process of a shell."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Stops().on_train_start(trainer(1, 1, Strategy()), None)
    assert {signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)} == {signal.SIG_IGN}


def test_the_exit_status_of_ctrl_c_before_a_run_begins(monkeypatch):
    """Lightning would exit with status 1."""

    def interrupted(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(trainer_commands, "command_line", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["fit"])
    assert end.value.code == 130


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
@pytest.mark.parametrize("overlap", [True, False])
def test_a_hanging_reward_does_not_delay_a_stop(checkpoints, tmp_path, monkeypatch, handlers, overlap):
    def hang(self, *, images, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(60)
        return torch.zeros(len(images))

    class Overlap(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            pl_module.scorer.settings = Scoring(overlap=overlap)

    ended = threading.Event()
    monkeypatch.setattr(Brightness, "score", hang)
    begun = time.monotonic()
    with pytest.raises(Stopped):
        run(checkpoints, tmp_path, WeightedSum(), callbacks=[Stops(), Overlap()])
    assert time.monotonic() - begun < 50
    ended.set()
