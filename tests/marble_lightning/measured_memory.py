"""What a run is estimated to take, and what it takes: the most bytes of CPU tensors alive, by the profiler's record."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from marble_lightning.memory.estimate import Choices, Estimator
from marble_lightning.memory.ledger import bytes_of


class Estimated(Callback):
    """Keeps the estimate of a run at its start, and how to make others."""

    def on_fit_start(self, trainer, pl_module):
        self.estimator, self.choices = Estimator(pl_module), Choices.of(pl_module)
        self.estimate = self.estimator(self.choices)


def most_alive(profiler: profile) -> int:
    """The largest sum of allocations less frees since the profiler began."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def recorder() -> profile:
    """Its record is read as it is: what torch 2.13 makes of it, asked for by `acc_events`, crashes now and then."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


class Measured(Callback):
    """Measures encoding, sampling, decoding, an optimizer step's micro-batches together, and the step itself."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def _keep(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def on_fit_start(self, trainer, pl_module):
        for name in ("encode", "sample", "decode"):
            setattr(pl_module.policy, name, self._recorded(name, getattr(pl_module.policy, name)))

    def _recorded(self, name: str, method: Any) -> Any:
        def recorded(*arguments: Any, **options: Any) -> Any:
            with recorder() as profiler:
                result = method(*arguments, **options)
            self._keep(name, most_alive(profiler))
            return result

        return recorded

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % pl_module.plan.per_step == 0:
            tensors = (batch.clean, batch.noise, batch.t, *vars(batch.conditions).values(), *batch.coefficients)
            self.begun_with = bytes_of(tensors)
            self.profiler = recorder()
            self.profiler.start()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.profiler.stop()
        self._keep("train", self.begun_with + most_alive(self.profiler))
        self.profiler = recorder()
        self.profiler.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % pl_module.plan.per_step == 0:
            self.profiler.stop()
            self._keep("optimizer", most_alive(self.profiler))
