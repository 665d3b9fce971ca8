"""Settings of scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from marble_lightning.utils.validation import require, require_one_of

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Scoring:
    """How images are scored, and what happens where a reward fails.

    Args:
        on_error: `raise` stops the run and names reward, prompt and image; `skip` treats failed scores as missing, counts
            them and continues.
        max_skipped: With `skip`, the share of a round's images in [0, 1) that a reward may fail on before the run stops. A
            reward without a single score in a round always stops it. An infinite value among the balancer's merged rewards
            or advantages counts as a failure.
        retries: Further attempts after an external failure (connections, time-outs, files), >= 0. Rewards with a setting
            `retries` use theirs instead.
        time_limit: Seconds that a reward may take for one batch, > 0, with `overlap` only; null for no limit.
        overlap: Whether a batch is scored while the next one is sampled, with one thread per reward. Set it to false where
            rewards and sampling would compete for the same CPU. On one GPU kernels of both run one after another; what
            overlaps is work of the CPU and of other machines, and a reward's seconds contain waiting for the sampling.
        devices: Device of a reward by its name, e.g. {geneval: cpu}; other rewards run on the policy's device. A numbered
            device, such as cuda:1, is the same one for every process of a machine.
        offload: Whether rewards are moved to the CPU between rounds. Their weights are not copied back.
    """

    on_error: OnError = "raise"
    max_skipped: float = 0.1
    retries: int = 2
    time_limit: float | None = None
    overlap: bool = True
    devices: dict[str, str] = field(default_factory=dict)
    offload: bool = False

    def __post_init__(self) -> None:
        require_one_of(OnError, "`scoring.on_error`", self.on_error)
        require(0 <= self.max_skipped < 1, "`scoring.max_skipped` must be in [0, 1)", self.max_skipped)
        require(self.retries >= 0, "`scoring.retries` must be >= 0", self.retries)
        require(
            self.time_limit is None or (self.time_limit > 0 and self.overlap),
            "`scoring.time_limit` must be > 0 seconds, or null, and needs `overlap`",
            f"{self.time_limit} with `overlap` {str(self.overlap).lower()}",
        )
        for name, device in self.devices.items():
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ValueError(
                    f"`scoring.devices` must hold devices like cpu or cuda:1. Found {name}: {device!r}."
                ) from error
