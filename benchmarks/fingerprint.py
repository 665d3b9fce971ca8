"""What the figures of a run depend on: its resolved configuration and the bundled weights and prompts, as sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from marble_lightning.command_line import MarbleCLI, command_line
from marble_lightning.tinyworld import PROMPTS, WEIGHTS

NOT_COMPARED = ("seed_everything",)
"""Settings that differ between runs of one comparison."""
ADDED = {("model", "objective", "kl_every"): 1, ("model", "policy", "init_args", "quantised"): None}
"""Settings that are newer than recorded figures, each with the value that changes nothing; only other values count."""


class ParsedCLI(MarbleCLI):
    """Parses a configuration, and creates and seeds nothing."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings, also those that have their defaults."""
        settings: dict[str, Any] = yaml.safe_load(self._config_yaml)
        return settings


@cache
def resolve(*arguments: str) -> dict[str, Any]:
    """All settings of a run of `fit` with these arguments."""
    parsed = command_line(arguments, run=False, kind=ParsedCLI)
    assert isinstance(parsed, ParsedCLI)
    return parsed.resolved


def fingerprint(arguments: Sequence[str]) -> dict[str, str]:
    """The sha256 of a run's `configuration`, and that of the bundled `weights` and prompts.

    Args:
        arguments: Arguments of `fit`, without folder and seed.
    """
    settings = {name: value for name, value in deepcopy(resolve(*arguments)).items() if name not in NOT_COMPARED}
    for (*sections, name), unchanged in ADDED.items():
        section = reduce(getitem, sections, settings)
        if section.get(name) == unchanged:
            section.pop(name, None)  # other classes of policy do not have it
    text = json.dumps(settings, sort_keys=True)
    return {"configuration": hashlib.sha256(text.encode()).hexdigest(), "weights": hash_of_files(WEIGHTS, PROMPTS)}


@cache
def hash_of_files(*folders: Path) -> str:
    """The sha256 of the names and contents of all files in folders."""
    total = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"):
            total.update(file.relative_to(folder).as_posix().encode() + b"\0")
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
