"""The most memory that this process has taken."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process since its start.

    Args:
        device: The device of the run.

    Returns:
        `gib`, and `of`: `GPU` for the tensors on a CUDA device (`torch.cuda.max_memory_allocated`), `process` for the
        resident memory of the process (`ru_maxrss`) with any other device.
    """
    if device.type == "cuda":
        return {"of": "GPU", "gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return {"of": "process", "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
