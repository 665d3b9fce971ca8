"""Two processes on the CPU learn what they should, together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("balancer", ["MARBLE", "WeightedSum"])
def test_two_processes_train_and_finish(small, tmp_path, balancer):
    """DistributedDataParallel over gloo: the run ends with a table, and its adapters have moved."""
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--balancer", balancer]
    options += ["--model.micro_batch_size", "6"]
    command = [sys.executable, "-m", "marble_lightning", "fit", *small, *options]
    ended = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "This run:" in ended.stdout
    saved = torch.load(tmp_path / "tiny/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert max(tensor.abs().max() for name, tensor in saved.items() if ".lora_B.trained" in name) > 0
