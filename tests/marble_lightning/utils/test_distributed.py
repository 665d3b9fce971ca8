"""Two ranks over gloo, of which one is late."""

from __future__ import annotations

import logging
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from marble_lightning.utils.distributed import wait_for_ranks
from tests.helpers.forks import on_two_ranks


def logs_of_two_ranks(folder: Path, monkeypatch, delay: float, time_out: float) -> tuple[list[int], list[str]]:
    """Let rank 1 be late in the second of three rounds; returns exit statuses and logs."""
    monkeypatch.setattr("marble_lightning.utils.distributed.REPORT_EVERY", 0.3)

    def run() -> None:
        rank = int(os.environ["LOCAL_RANK"])
        logging.basicConfig(filename=folder / f"log.{rank}", level=logging.WARNING, force=True)
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        try:
            for index in range(3):
                time.sleep(delay if (rank, index) == (1, 1) else 0)
                wait_for_ranks(DDPStrategy(timeout=timedelta(seconds=time_out)), f"the scores of round {index}")
                distributed.all_reduce(torch.ones(1))
        except TimeoutError as error:
            logging.error("%s", error)
            raise

    statuses = on_two_ranks(run, folder / "output")
    return statuses, [(folder / f"log.{rank}").read_text() for rank in range(2)]


def test_a_late_rank_is_named_while_others_wait(tmp_path, monkeypatch):
    statuses, (first, second) = logs_of_two_ranks(tmp_path, monkeypatch, delay=0.8, time_out=20)
    assert statuses == [0, 0] and not second
    warning = first.splitlines()[0]
    assert re.search(
        r"WARNING.*Rank 0 has waited for \d s for rank 1 to finish the scores of round 1\. The time-out", warning
    )
    assert "Read the log of the late rank." in warning


def test_the_error_of_a_time_out_names_the_late_rank(tmp_path, monkeypatch):
    statuses, (first, _) = logs_of_two_ranks(tmp_path, monkeypatch, delay=2, time_out=1)
    assert statuses[0] == 1
    error = first.splitlines()[-1]
    assert re.search(r"ERROR.*Rank 0 has waited for \d s for rank 1 to finish the scores of round 1\.", error)
    assert "The time-out of the process group is 1 s." in error and "--trainer.strategy.timeout 2:00:00" in error


def test_a_single_process_waits_for_nobody():
    wait_for_ranks(DDPStrategy(), "the scores of round 0")
