"""Parsers of the command line, with short error messages and old names of options."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser

import balancers
import rewards

SUBCOMMANDS = {"fit", "validate", "test", "predict"}
"""Sections of a configuration for several subcommands."""


def import_classes() -> None:
    """Import the bundled balancers and rewards, so that the parser finds them by their short names."""
    for package in (balancers, rewards):
        for name in package.__all__:
            getattr(package, name)


class Parser(ArgumentParser):
    """jsonargparse's parser with short errors and with old names of options.

    Errors lack the usage text, which has 110 lines for `fit`; `--help` prints it.
    """

    hint = "All settings: {prog} --help"
    new_names: ClassVar[Mapping[str, str]] = {}
    """New names of options and sections, by their old names, which are accepted with a warning for one release."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        try:
            words = rename_options(words, self.new_names)
        except ValueError as error:
            self.error(str(error))
        return super().parse_args(words, *others, **options)

    def _apply_actions(self, cfg: Any, *others: Any, **options: Any) -> Any:
        # The only place where jsonargparse has a configuration as it was written, for files and for text
        try:
            cfg = without_amortize(rename_keys(cfg, self.new_names)) if isinstance(cfg, dict) else cfg
        except ValueError as error:
            raise TypeError(str(error)) from error  # the parser reports a TypeError as a wrong configuration
        return super()._apply_actions(cfg, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and the command for help, and exit with status 2."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {message}\n{self.hint.format(prog=parser.prog.replace(' [options]', ''))}\n")


class ExportParser(Parser):
    """The parser of `export`, which takes `--dry-run` for `--dry_run true`."""

    new_names: ClassVar = {"which": "adapter"}
    switches = ("dry_run", "fuse", "overwrite")

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().parse_args(plain_options(args or [], self.switches), *others, **options)


def name_arguments(words: Sequence[str]) -> list[str]:
    """Give arguments without a name theirs: `sweep FILE` and `report FOLDER FOLDER`.

    >>> name_arguments(["sweep", "sweep.yaml", "--jobs", "2"])
    ['--config', 'sweep.yaml', '--jobs', '2']
    >>> name_arguments(["report", "a", "b", "--to", "c"])
    ['--runs', '["a", "b"]', '--to', 'c']
    """
    command, *rest = words
    count = next((index for index, word in enumerate(rest) if word.startswith("-")), len(rest))
    unnamed, named = rest[:count], rest[count:]
    if not unnamed:
        return named
    if command == "sweep":
        return ["--config", *unnamed, *named]
    return ["--runs", json.dumps(unnamed), *named] if command == "report" else rest


def plain_options(words: Sequence[str], switches: Sequence[str]) -> list[str]:
    """Replace hyphens in names of options by underscores, and give switches without a value theirs, `true`.

    >>> plain_options(["--push-to-hub", "me/a-b", "--dry-run", "--fuse", "false"], ["dry_run", "fuse"])
    ['--push_to_hub', 'me/a-b', '--dry_run', 'true', '--fuse', 'false']
    """
    plain = list[str]()
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        plain.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word)
        if plain[-1].removeprefix("--") in switches and following.startswith("--"):
            plain.append("true")
    return plain


def rename_options(words: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """Replace old names in the words of a command line, such as `--old`, `--old=1` and `--old.key`, and warn.

    Raises:
        ValueError: An option is given under both names.
    """
    names = [match[1] if (match := re.match(r"--(\w+)", word)) else "" for word in words]
    _warn_of_old_names(names, new_names, "--")
    return [
        f"--{new_names[name]}{word[2 + len(name) :]}" if name in new_names else word
        for name, word in zip(names, words, strict=True)
    ]


def rename_keys(config: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Replace old names in the keys of a configuration, also in the sections of subcommands, and warn.

    Raises:
        ValueError: A section is given under both names.
    """
    names = [key.partition(".")[0] for key in config]
    _warn_of_old_names(names, new_names, "")
    renamed = {
        new_names.get(name, name) + key[len(name) :]: value for name, (key, value) in zip(names, config.items(), strict=True)
    }
    for name in SUBCOMMANDS & renamed.keys():
        if isinstance(renamed[name], dict):
            renamed[name] = rename_keys(renamed[name], new_names)
    return renamed


def without_amortize(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove `amortize: raw` from the balancer of a configuration of an earlier version: it is the only way now.

    Raises:
        ValueError: It is another value.
    """
    kept = {
        key: without_amortize(value) if key in SUBCOMMANDS | {"balancer", "init_args"} and isinstance(value, dict) else value
        for key, value in config.items()
    }
    if (value := kept.pop("amortize", "raw")) != "raw":
        raise ValueError(
            f"`amortize` must be left out: weights multiply raw gradients between refreshes. Found {value!r}; the other way "
            "failed where a reward opposed the others. `refresh_every: 1` normalises on every step."
        )
    return kept


def _warn_of_old_names(names: Sequence[str], new_names: Mapping[str, str], prefix: str) -> None:
    for old, new in new_names.items():
        if old in names and new in names:
            raise ValueError(
                f"`{prefix}{new}` must be given once. Found also its old name `{prefix}{old}`; use only `{prefix}{new}`."
            )
        if old in names:
            warnings.warn(
                f"`{prefix}{old}` is now `{prefix}{new}`. Use that name; the next release does not accept the old one.",
                FutureWarning,
                stacklevel=4,
            )
