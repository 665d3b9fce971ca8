"""How much memory a run needs, counted before its first round.

A run's phases are gone through on tensors without data (`phases`), with a ledger of what is alive (`ledger`); parts and
phases add up to an estimate at the run's settings or at others (`estimate`), which is printed, and refuses a run that cannot
fit (`report`).
"""

from marble_lightning.memory.report import Memory

__all__ = ["Memory"]
