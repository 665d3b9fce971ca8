"""A custom schedule of the old adapter; `--model.averaging schedule.Halfway --model.averaging.since 10`."""

from dataclasses import dataclass

from marble_lightning import Averaging


@dataclass(frozen=True)
class Halfway(Averaging):
    """The old adapter stays where it is until optimizer step `since`, then follows the trained one completely."""

    since: int = 2

    def old_decay(self, step: int) -> float:
        return 0.0 if step >= self.since else 1.0
