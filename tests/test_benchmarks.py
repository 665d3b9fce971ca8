"""Every benchmark runs, with its smallest options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.timed_rounds import EVERY_STEP, METHODS, Turns
from benchmarks.training_speed import table
from tests.helpers import ROOT

SMALL = {
    "averaged_specialists": "--stage aligned --rounds 1 --folder {folder} --results {folder}/averaged "
    "--specialists {folder}/figures --data.held_out_per_source 3",
    "kill_and_resume": "--kills 1 --folder {folder}",
    "memory": "--frugal --no-overlap --prompts 3 --held-out 2 --sampling 2 --micro 2 --checkpointing",
    "methods": "--stage aligned --methods split plain_sum --seeds 0 --rounds 1 --folder {folder} --results {folder}/results "
    "--specialists {folder}/results --data.held_out_per_source 4",
    "ocr_workers": "--images 4 --cycles 1",
    "policies_in_one_pass": "--sizes 3 --cycles 1",
    "round_speed": "--cycles 1",
    "scaling": "--ranks 1 5",
    "scoring_overlap": "--cycles 1",
    "soak": "--rounds 4 --every 1",
    "stage": "--base --prompts 1 --images 2 --folder {folder} --results {folder}/results",
    "training_speed": "--rewards 2 --cycles 1 --memory",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SMALL)
def test_it_prints_its_table(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name].format(folder=tmp_path).split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # four rounds are too few for soak's verdict, which is its exit status
    assert ended.returncode in ((0, 1) if name == "soak" else (0,)), ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "|" in ended.stdout or "│" in ended.stdout


def test_an_interrupted_training_speed_has_the_table_of_its_complete_cycles():
    plain, every = (METHODS[0], 5), (EVERY_STEP, 5)
    turns = Turns([plain, every], cycles=3)
    assert turns.complete() == 0
    turns.training |= {plain: [10.0, 20.0], every: [30.0]}
    turns.whole |= {plain: [20.0, 50.0], every: [40.0]}
    assert turns.complete() == 1
    assert "| MARBLE, every step | 5 | 30.00 | 0.33 | 0.33 to 0.33 | 0.50 |" in table(turns)
