"""Checkpoint files of a small state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from marble_lightning.checkpoints.files import WholeCheckpointIO

WEIGHTS = torch.arange(8.0)


STATE = {
    "epoch": 1, "global_step": 3, "pytorch-lightning_version": "2.6.6", "state_dict": {"weights": WEIGHTS},
    "loops": {"fit_loop": {}}, "lora": {"rank": 1, "alpha": 1.0, "targets": []}, "base_model": {}, "rewards": [],
    "config": None, "base_measured": "", "base_scores": None, "trained_scores": None, "callbacks": {},
    "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}], "lr_schedulers": [],
}  # fmt: skip
"""A minimal checkpoint of `fit`."""


def write_checkpoint(path: Path, age: int = 0, state: Any = STATE) -> Path:
    """Write a checkpoint with a modification time `age` seconds ago."""
    WholeCheckpointIO().save_checkpoint(state, path)
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:100])
    return r"its end is missing, or it is no checkpoint \(100 bytes\)"


def flip_bits(file: Path) -> str:
    content = file.read_bytes()
    at = content.index(WEIGHTS.numpy().tobytes())
    file.write_bytes(content[: at + 9] + b"\xff" + content[at + 10 :])
    return r"its record \S+data/0 does not match its checksum"


def remove(file: Path) -> str:
    file.unlink()
    return "no such file from .*"
