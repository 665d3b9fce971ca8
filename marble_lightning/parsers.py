"""Parsers of the command line, with short error messages."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

import balancers
import rewards
from marble_lightning.config_files import located

NULLABLE = ("model.rewards", "model.metrics")
"""Mappings that a later configuration replaces as a whole."""


def import_classes() -> None:
    """Import the bundled balancers and rewards, so that the parser finds them by their short names."""
    for package in (balancers, rewards):
        for name in package.__all__:
            getattr(package, name)


class Parser(ArgumentParser):
    """jsonargparse's parser without the usage text in errors, which has 110 lines for `fit`; `--help` prints it."""

    hint = "All settings: {prog} --help"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and the command for help, and exit with status 2."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {message}\n{self.hint.format(prog=parser.prog.replace(' [options]', ''))}\n")


class ConfigByName(ActionConfigFile):
    """The option `-c`, which takes a file or a name.

    If all rewards of a later configuration are null, it only removes these rewards from the earlier ones.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            file = located(values)
        except ValueError as error:
            raise TypeError(str(error)) from error  # the parser reports a TypeError as a wrong argument
        before = {name: cfg.get(name) for name in NULLABLE}
        super().__call__(parser, cfg, file, option_string)
        for name, earlier in before.items():
            later = cfg.get(name)
            if earlier and later and not any(later.values()):
                cfg[name] = earlier | later


class TrainingParser(Parser, LightningArgumentParser):
    """LightningCLI's parser, with configurations by name."""

    hint = f"{Parser.hint}. Configurations for -c: marble-lightning configs"

    def add_argument(self, *args: Any, **options: Any) -> Any:
        if options.get("action") is ActionConfigFile:
            options |= {
                "action": ConfigByName,
                "help": "A YAML file, or the name of a configuration (`marble-lightning configs` lists them); "
                "a later one overrides an earlier one.",
            }
        return super().add_argument(*args, **options)
