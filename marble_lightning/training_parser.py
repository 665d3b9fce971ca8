"""The parser of the commands that need a trainer, with configurations by name."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from marble_lightning.config_files import locate
from marble_lightning.parsers import Parser

NULLABLE = ("model.rewards", "model.metrics")
"""Mappings that a later configuration replaces as a whole."""


class ConfigByName(ActionConfigFile):
    """The option `-c`, which takes a file or a name.

    If all rewards of a later configuration are null, it only removes these rewards from the earlier ones.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            file = locate(values)
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
