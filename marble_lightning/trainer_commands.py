"""The commands that need a trainer, with the statuses of their processes: `fit|validate|test|predict` and `memory`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch.utilities.exceptions import SIGTERMException

from marble_lightning.checkpoints.signals import status
from marble_lightning.checks import check_prompts_per_process, get_balancer
from marble_lightning.command_line import MarbleCLI, command_line
from marble_lightning.memory import estimate_memory
from marble_lightning.memory.report import print_estimate
from marble_lightning.policies.sharding import ShardedBaseStrategy


def number_of(devices: Any) -> int:
    """Number of devices that a setting of the trainer stands for; 1 where it depends on the machine.

    >>> number_of(8), number_of("2"), number_of("0,3"), number_of([0, 1, 2]), number_of("auto"), number_of(-1)
    (8, 2, 2, 3, 1, 1)
    """
    if isinstance(devices, str):
        devices = devices.split(",") if "," in devices else int(devices) if devices.isdigit() else 1
    return max(len(devices) if isinstance(devices, list) else devices, 1)


class MemoryCLI(MarbleCLI):
    """Estimates the memory of a run on the CPU of this machine. It has the options of `fit`."""

    def before_instantiate_classes(self) -> None:
        """Replace the run's GPUs by this machine's CPU, and write no files."""
        trainer = self.config.trainer
        self.gpus = number_of(trainer.devices) * trainer.num_nodes
        sharded = str(getattr(trainer.strategy, "class_path", "")).endswith(ShardedBaseStrategy.__name__)
        self.shards = number_of(trainer.devices) if sharded else 1
        trainer.accelerator, trainer.devices, trainer.num_nodes = "cpu", 1, 1
        trainer.strategy, trainer.logger = "auto", False
        super().before_instantiate_classes()

    def print_memory(self) -> None:
        """Load the weights, and print the memory that each process of the run needs."""
        self._check_settings("fit")
        check_prompts_per_process(self.datamodule, self.gpus)
        get_balancer(self.trainer).setup(self.trainer, self.model, "fit")
        self.model.setup("fit")
        print_estimate(estimate_memory(self.model, self.gpus, shards=self.shards), self.gpus)


def run(args: Sequence[str] | None) -> None:
    """Run a command; `args` replaces `sys.argv` where given."""
    words = sys.argv[1:] if args is None else args
    try:
        if words and words[0] == "memory":
            cast(MemoryCLI, command_line(words[1:], run=False, kind=MemoryCLI)).print_memory()
        else:
            command_line(args)
    except SIGTERMException as end:
        sys.exit(status(end))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # raised outside `Stops`; Lightning would exit with status 1
            end.code = 128 + signal.SIGINT
        raise
