"""Seconds of the phases of a round."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("encode", "sample", "decode", "score", "train")


class Phases:
    """Adds up what each phase of a round takes, once the device has done all it was given."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        begun = now()
        yield
        self.seconds[phase] += now() - begun

    def taken(self) -> dict[str, float]:
        """Seconds of each phase since this was asked last, and begin anew."""
        found = {phase: self.seconds[phase] for phase in PHASES}
        self.seconds.clear()
        return found


def now() -> float:
    """Seconds, once a CUDA device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
