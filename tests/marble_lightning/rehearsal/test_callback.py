"""A rehearsal does all that a run does, prints a table, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.rehearsal.callback import without_first
from tests.helpers import ROOT
from tests.helpers.command_line import fit_with, options

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]

REHEARSE = ["--trainer.fast_dev_run", "true"]


def check(shown: str, folder: Path, *names: str) -> None:
    """The table has all rows, with numbers, and neither the run's folder nor the temporary one has files."""
    (temporary,) = re.findall(r"All files go to (\S+), which is removed", shown)
    assert not Path(temporary).exists() and not list(folder.iterdir())
    rows = {row[1].strip(): row for line in shown.splitlines() if len(row := line.split("│")) == 5}
    assert {"sampling", "training", "checkpoints", "peak memory of the process", *names} <= rows.keys()
    assert "images a second" in rows["sampling"][2] and "s a micro-batch" in rows["training"][2]
    hours = [float(row[3]) for row in rows.values() if row[3].strip()]
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.01)
    assert all(float(re.match(r"\s*([\d.e-]+) s an image", rows[name][2])[1]) > 0 for name in names)


def test_a_rehearsal_measures_everything_and_leaves_nothing_behind(small, tmp_path, capsys):
    main(["fit", *small, *REHEARSE])
    shown = capsys.readouterr().out
    check(shown, tmp_path, "pickscore", "hpsv2", "clipscore", "ocr", "geneval", "geneval_accuracy")
    assert "hours of 2 round(s)" in shown
    assert "This run:" not in shown and "by tag" not in shown


class Sizes(Callback):
    """Notes what a rehearsal trains on, and can spoil the adapters before the checkpoint is read."""

    def __init__(self, spoil: bool = False) -> None:
        self.spoil, self.refreshes, self.images = spoil, list[bool](), set[int]()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.refreshes.append(pl_module.balancer.solved)
        self.images |= {len(pl_module.rollout.groups), len(batch.clean)}

    def on_train_end(self, trainer, pl_module):
        assert trainer.global_step == 2
        if self.spoil:
            with torch.no_grad():
                pl_module.trainable[0].add_(1)


def test_micro_batches_keep_their_size_and_the_first_step_solves(checkpoints, tmp_path, capsys):
    """The run has three rounds of four steps; a later run begins with the first round."""
    noted = Sizes()
    changed = {
        "model.policy.prompt_cache": tmp_path / "cache", "model.inner_epochs": 2, "data.held_out_per_source": "null",
        "model.micro_batch_size": 6,
    }  # fmt: skip
    fit_with([*options(checkpoints, tmp_path, **changed), *REHEARSE], noted)
    shown = capsys.readouterr().out
    check(shown, tmp_path, "clipscore", "jpeg")
    assert "hours of 3 round(s)" in shown and "A round of the run has 12 more images on each process" in shown
    assert noted.images == {12, 6}  # one batch of sampling, and micro-batches
    assert noted.refreshes == [False] * 3 + [True] + [False] * 4


def test_a_checkpoint_that_differs_from_the_adapters_is_an_error(checkpoints, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="A checkpoint must hold the adapters that it was written from"):
        fit_with([*options(checkpoints, tmp_path), *REHEARSE], Sizes(spoil=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(file.stem for file in sorted((ROOT / "configs/balancers").glob("*.yaml")))])
def test_every_balancer_can_be_rehearsed(name, small, tmp_path, capsys):
    method = ["-c", "balancers/pcgrad"] if name == "cadence_marble" else []
    fast = ["--model.rewards.ocr", "null", "--model.metrics", "{}"]
    main(["fit", *small, *method, "-c", f"balancers/{name}", *fast, *REHEARSE])
    check(capsys.readouterr().out, tmp_path, "pickscore", "hpsv2", "clipscore", "geneval")


@pytest.mark.slow
def test_two_processes_rehearse(small, tmp_path):
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.micro_batch_size", "6"]
    ended = subprocess.run(
        [sys.executable, "-m", "marble_lightning", "fit", *small, *more, *REHEARSE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    check(ended.stdout, tmp_path, "pickscore", "ocr", "geneval_accuracy")


def test_the_first_of_several_warms_up():
    assert without_first([9.0, 2.0, 4.0]) == 3.0
    assert without_first([9.0]) == 9.0
    assert without_first([]) == 0.0
