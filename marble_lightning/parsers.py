"""Parsers of the command line, with short error messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

import balancers
import rewards


def import_classes() -> None:
    """Import the bundled balancers and rewards, so that the parser finds them by their short names."""
    for package in (balancers, rewards):
        for name in package.__all__:
            getattr(package, name)


class Parser(ArgumentParser):
    """jsonargparse's parser with short errors: they lack the usage text, 110 lines for `fit`, which `--help` prints."""

    hint = "All settings: {prog} --help"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and the command for help, and exit with status 2."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {message}\n{self.hint.format(prog=parser.prog.replace(' [options]', ''))}\n")


class ExportParser(Parser):
    """The parser of `export`, which takes `--dry-run` for `--dry_run true`."""

    switches = ("dry_run", "fuse", "overwrite")

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().parse_args(plain_options(args or [], self.switches), *others, **options)


def run_command(function: Callable[..., Any], args: Sequence[str] | None, prog: str, parser: type[Parser] = Parser) -> None:
    """Call a function with the arguments of a command line.

    A ValueError ends the program with its message alone, since a traceback would bury what is wrong. With
    `JSONARGPARSE_DEBUG=true` it is raised.

    Args:
        function: The function; its parameters are the options.
        args: Arguments; None for those of the process.
        prog: Name of the command.
        parser: Class of the parser.
    """
    try:
        words = None if args is None else list(args)
        auto_cli(function, args=words, as_positional=False, prog=prog, parser_class=parser)
    except ValueError as error:
        if "JSONARGPARSE_DEBUG" in os.environ:
            raise
        sys.exit(f"error: {error}")


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
