"""A sweep of real runs: stopped, killed, and finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from marble_lightning.lab.report.collect import collect
from tests.helpers import ROOT

SEEDS = (0, 1)
SETTINGS = {
    "trainer": {"max_epochs": 2, "check_val_every_n_epoch": 2},
    "data": {"held_out_per_source": 2, "prompts_per_round": 6, "images_per_prompt": 4},
    "model": {"sampling": {"batch_size": 24}, "evaluation": {"steps": 4}, "micro_batch_size": 8},
}
"""Two rounds of the tiny configuration with few images."""


def start(file: Path) -> subprocess.Popen[str]:
    """Start the sweep."""
    command = [sys.executable, "-m", "marble_lightning", "sweep", str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def runs_of(sweep: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the runs that a sweep has started and that have not ended."""
    return [int(number) for number in Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()]


def follow_until(sweep: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait for a condition; at no time may more than two runs be running."""
    while not condition():
        assert sweep.poll() is None, sweep.communicate()[0]
        assert len(runs_of(sweep)) <= 2
        time.sleep(0.1)


@pytest.fixture
def sweep(tmp_path) -> tuple[Path, Path]:
    """The file and the folder of a sweep of three variants, of which one cannot work, two at a time."""
    broken = {"model": {"rewards": {"pickscore": {"init_args": {"path": str(tmp_path / "nowhere")}}}}}
    content = {
        "folder": str(tmp_path / "runs"),
        "configs": ["tiny"],
        "settings": SETTINGS,
        "seeds": list(SEEDS),
        "variants": {"marble": {}, "sum": {"configs": ["balancers/weighted_sum"]}, "broken": {"settings": broken}},
        "jobs": 2,
        "threads": 1,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "sweep.yaml", tmp_path / "runs"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_sweep_that_was_stopped_and_killed_is_finished_by_the_same_command(sweep):
    file, folder = sweep

    def rounds() -> int:
        return len([file for file in folder.glob("*/*/version_*/checkpoints/*round_*.ckpt") if "before" not in file.name])

    process = start(file)  # Ctrl-C after the first round of some run
    follow_until(process, lambda: rounds() >= 1)
    process.send_signal(signal.SIGINT)
    stopped = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGINT, stopped

    done, process = rounds(), start(file)  # kill -9 of the sweep one round later; its runs outlive it
    follow_until(process, lambda: rounds() > done and len(runs_of(process)) > 0)
    outliving = runs_of(process)
    for number in outliving:
        os.kill(number, signal.SIGSTOP)  # so that none ends before the next command has looked
    process.kill()
    process.communicate()
    refused = start(file)
    assert "A sweep must not be started twice. Found" in refused.communicate()[0] and refused.returncode == 1
    for number in outliving:
        os.kill(number, signal.SIGKILL)

    process = start(file)
    follow_until(process, lambda: rounds() > done + 1 or not runs_of(process))
    printed = process.communicate()[0]
    print(printed)
    assert process.returncode == 1
    assert "4 finished, 2 failed" in printed
    for seed in SEEDS:
        assert f"broken, seed {seed} failed: " in printed and "nowhere" in printed
        assert f"All messages: {folder}/broken/seed_{seed}/output.txt" in printed
        for name in ("marble", "sum"):
            assert len(list((folder / name / f"seed_{seed}").glob("version_*/results.json"))) == 1
    found = collect([folder])
    assert {name: sorted(seeds) for name, seeds in found.methods.items()} == {"marble": [0, 1], "sum": [0, 1]}
    assert len({run.evaluated["optimizer_step"] for run in found.runs}) == 1
    assert found.unfinished == [] or all("broken" in str(place) for place in found.unfinished)
