"""Finished runs, read back and compared."""

from marble_lightning.lab.runs import Run, compare

__all__ = ["Run", "compare"]
