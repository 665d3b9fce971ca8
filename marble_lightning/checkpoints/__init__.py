"""Checkpoints of rounds: what they hold, when they are written, and how a run that was stopped resumes."""

from marble_lightning.checkpoints.callback import RoundCheckpoint

__all__ = ["RoundCheckpoint"]
