"""The command line: `marble-lightning fit|validate|test|predict|export|configs|memory|sweep|report`.

A command is imported when it is asked for, since most of them need only a part of what training needs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from marble_lightning.parsers import ExportParser, Parser, name_arguments, run_command

WITHOUT_TRAINER = {
    "configs": ("marble_lightning.config_files", Parser),
    "export": ("marble_lightning.hub", ExportParser),
    "report": ("marble_lightning.lab.report", Parser),
    "sweep": ("marble_lightning.lab.sweep", Parser),
}
"""Module and parser of the commands that need no trainer; those of LightningCLI are methods of the trainer."""


def imported(module: str) -> ModuleType:
    """Import a module, without collections of garbage meanwhile: they would search all that was imported, again and again.

    Modules are never garbage, so later collections leave them out too.
    """
    if module in sys.modules:  # objects of an earlier command may be garbage by now
        return sys.modules[module]
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    words = list(sys.argv[1:] if args is None else args)
    name = words[0] if words else ""
    if name in WITHOUT_TRAINER:
        module, parser = WITHOUT_TRAINER[name]
        command, named = getattr(imported(module), name), name_arguments(words)
        run_command(command, named, f"marble-lightning {name}", parser)
    else:
        imported("marble_lightning.trainer_commands").run(args)
