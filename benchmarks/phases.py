"""Durations of the phases of a round."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("encode", "sample", "decode", "score", "train")


class Phases:
    """Sums the seconds of each phase of a round, after synchronising the device."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = now()
        yield
        self.seconds[phase] += now() - start

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; resets them."""
        seconds = {phase: self.seconds[phase] for phase in PHASES}
        self.seconds.clear()
        return seconds


def now() -> float:
    """Time in seconds, after synchronising a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
