"""Check that memory, threads and open files do not grow in a run of many small rounds.

`python -m benchmarks.soak --rounds 40` fits a small run of configs/tiny.yaml. It prints a table in Markdown with a line
every ten rounds and the result, and exits with status 1 if anything grows. Other options are passed to `fit`. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.kill_and_resume import options
from marble_lightning.cli import main as marble_lightning

SLACK = 0.03
"""Allowed growth of memory from the second to the last quarter of the rounds, since allocators keep pages."""


class Use(NamedTuple):
    """Resources that a process uses: resident memory in MiB, threads, open files."""

    memory: float
    threads: int
    files: int


def use() -> Use:
    """Resources that this process uses now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Use(int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), len(os.listdir("/proc/self/fd")))


USES: list[Use] = []
"""One entry per round."""


class Watch(Callback):
    """Records the resources of the process after each round."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        USES.append(use())


def growth(uses: Sequence[Use]) -> list[str]:
    """Resources with a higher median in the last quarter of the rounds than in the second one."""
    quarter = max(1, len(uses) // 4)
    early, late = (
        Use(*(median(values) for values in zip(*part, strict=True)))
        for part in (uses[quarter : 2 * quarter], uses[-quarter:])
    )
    allowed = Use(early.memory * (1 + SLACK), early.threads, early.files)
    return [
        f"{name} from {before:.0f} to {after:.0f}"
        for name, before, after, limit in zip(Use._fields, early, late, allowed, strict=True)
        if after > limit
    ]


def table(uses: Sequence[Use], every: int) -> str:
    """One line every `every` rounds."""
    lines = ["| rounds | memory, MiB | threads | open files |", "|---" * 4 + "|"]
    for rounds in range(every, len(uses) + 1, every):
        memory, threads, files = uses[rounds - 1]
        lines.append(f"| {rounds} | {memory:.0f} | {threads} | {files} |")
    return "\n".join(lines)


def main() -> None:
    """Run and print the table and the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="rounds from one line of the table to the next")
    chosen, extra = parser.parse_known_args()
    if chosen.rounds < 4 or chosen.rounds % 4:
        parser.error(f"--rounds must be a multiple of 4, since quarters are compared. Found {chosen.rounds}.")

    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder:
        rounds = ["--trainer.max_epochs", str(chosen.rounds), "--trainer.check_val_every_n_epoch", str(chosen.rounds // 4)]
        marble_lightning([*options(Path(folder), rounds), "--trainer.callbacks+=benchmarks.soak.Watch", *extra])
    uses = sys.modules["benchmarks.soak"].USES  # the callback is imported from this module, which is not __main__
    print(f"\n{table(uses, min(chosen.every, chosen.rounds // 4))}\n")
    grown = growth(uses)
    print(f"Grows: {', '.join(grown)}." if grown else "Flat: no resource grows.")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
