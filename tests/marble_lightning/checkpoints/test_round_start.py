"""Checkpoints that are requested during a round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.round_start import RoundStart
from tests.helpers.checkpoint_files import STATE, write_checkpoint


def begun_round(file: Path, is_global_zero: bool) -> Any:
    """A trainer in the middle of its second round, whose beginning is in a file of the first process."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=2, processed=1))
    return SimpleNamespace(
        is_global_zero=is_global_zero, global_step=3, fit_loop=SimpleNamespace(epoch_progress=progress),
        strategy=SimpleNamespace(broadcast=lambda _: file), checkpoint_callbacks=[RoundCheckpoint()],
    )  # fmt: skip


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_only_the_first_process_reads_the_file_of_the_rounds_beginning(tmp_path, is_global_zero):
    """Another machine does not have it if machines share no folder."""
    file = tmp_path / "round_0000.ckpt"
    if is_global_zero:
        write_checkpoint(file)
    trainer, start = begun_round(file, is_global_zero), RoundStart()
    start.keep(trainer)
    requested = STATE | {"global_step": 5}
    start.put_into(requested, trainer)
    assert requested["global_step"] == (3 if is_global_zero else 5)
