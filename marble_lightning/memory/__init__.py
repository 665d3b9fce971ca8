"""How much GPU memory a run needs, counted without a GPU.

Every phase of a run is run once on fake tensors, which have shapes and no data (`phases`), with a ledger of those alive
(`ledger`). Phases and what stays between them add up to an estimate (`estimate`). `marble-lightning memory` prints it, and
`fit` refuses a run that cannot fit on its GPU (`report`).
"""

from marble_lightning.memory.estimate import Estimate, estimate_memory
from marble_lightning.memory.report import Memory

__all__ = ["Estimate", "Memory", "estimate_memory"]
