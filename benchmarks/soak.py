"""A run of many small rounds: do memory, threads and open files stay as they are?

`python -m benchmarks.soak --rounds 40` fits a small run of configs/tiny.yaml and prints a table in Markdown: a line every
ten rounds, then a verdict; it ends with status 1 where anything grows. Other options go to `fit`. Linux only.
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
"""Growth of memory from the second quarter of the rounds to the last one that counts as none: allocators keep pages."""


class Use(NamedTuple):
    """What a process uses after a round: resident memory in MiB, threads, open files."""

    memory: float
    threads: int
    files: int


def use() -> Use:
    """Of this process, now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Use(int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), len(os.listdir("/proc/self/fd")))


SEEN: list[Use] = []
"""One per round."""


class Watch(Callback):
    """Writes down what the process uses after each round."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SEEN.append(use())


def grown(seen: Sequence[Use]) -> list[str]:
    """What is used more of in the last quarter of the rounds than in the second one, by their medians."""
    quarter = max(1, len(seen) // 4)
    early, late = (
        Use(*(median(each) for each in zip(*part, strict=True))) for part in (seen[quarter : 2 * quarter], seen[-quarter:])
    )
    allowed = Use(early.memory * (1 + SLACK), early.threads, early.files)
    return [
        f"{name} from {before:.0f} to {after:.0f}"
        for name, before, after, most in zip(Use._fields, early, late, allowed, strict=True)
        if after > most
    ]


def table(seen: Sequence[Use], every: int) -> str:
    """A line every so many rounds."""
    lines = ["| rounds | memory, MiB | threads | open files |", "|---" * 4 + "|"]
    for rounds in range(every, len(seen) + 1, every):
        memory, threads, files = seen[rounds - 1]
        lines.append(f"| {rounds} | {memory:.0f} | {threads} | {files} |")
    return "\n".join(lines)


def main() -> None:
    """Run, tabulate, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="rounds from one line of the table to the next")
    chosen, extra = parser.parse_known_args()
    if chosen.rounds < 4 or chosen.rounds % 4:
        parser.error(f"--rounds must be a multiple of 4, whose last quarter is compared. Found {chosen.rounds}.")

    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder:
        rounds = ["--trainer.max_epochs", str(chosen.rounds), "--trainer.check_val_every_n_epoch", str(chosen.rounds // 4)]
        marble_lightning([*options(Path(folder), rounds), "--trainer.callbacks+=benchmarks.soak.Watch", *extra])
    found = sys.modules["benchmarks.soak"].SEEN  # of the module that the callback's name imports, which is not __main__
    print(f"\n{table(found, min(chosen.every, chosen.rounds // 4))}\n")
    more = grown(found)
    print(f"Grows: {', '.join(more)}." if more else "Flat: nothing is used more of at the end than at the start.")
    sys.exit(1 if more else 0)


if __name__ == "__main__":
    main()
