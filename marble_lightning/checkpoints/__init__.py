"""Checkpoints of rounds: their content, when they are written, and how a stopped run resumes."""

from marble_lightning.checkpoints.callback import RoundCheckpoint

__all__ = ["RoundCheckpoint"]
