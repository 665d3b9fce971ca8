"""Reading and comparing finished runs."""

from marble_lightning.lab.runs import Run, compare

__all__ = ["Run", "compare"]
