"""The help text of every setting."""

from __future__ import annotations

import inspect
from argparse import Action

import pytest
from jsonargparse import ArgumentParser

import balancers
import marble_lightning
import rewards
from marble_lightning.command_line import CKPT_PATH, MarbleCLI, command_line

CLASSES = [
    member
    for package in (balancers, rewards, marble_lightning)
    for name in package.__all__
    if inspect.isclass(member := getattr(package, name)) and hasattr(member, "setup")  # classes that a configuration names
]


class Parsed(Exception):
    """Raised with the parser once it is built."""


def without_help(actions: list[Action]) -> list[str]:
    """Settings with a help text of fewer than three words, except Lightning's `trainer`."""
    return [
        action.dest
        for action in actions
        if not action.dest.startswith("trainer") and len(str(action.help or "").split()) < 3
    ]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_setting_has_a_line_of_help(command, monkeypatch):
    def stop(self, *arguments):
        raise Parsed(self)

    monkeypatch.setattr(MarbleCLI, "parse_arguments", stop)
    with pytest.raises(Parsed) as parsed:
        command_line([command])
    actions = parsed.value.args[0]._subcommand_parsers[command]._actions
    known = {action.dest: action.help for action in actions}
    for group in ("model", "model.sampling", "model.objective", "model.averaging", "model.scoring", "data", "memory"):
        assert any(name.rpartition(".")[0] == group for name in known), group
    assert known["ckpt_path"] == CKPT_PATH
    assert without_help(actions) == []


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_argument_of_configurable_classes_has_a_line_of_help(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, fail_untyped=False)
    assert without_help(parser._actions) == []


def test_a_setting_without_help_is_found():
    class Undocumented:
        """It does something."""

        def __init__(self, much: int = 1) -> None:
            """Do it."""

    parser = ArgumentParser()
    parser.add_class_arguments(Undocumented)
    assert without_help(parser._actions) == ["much"]
