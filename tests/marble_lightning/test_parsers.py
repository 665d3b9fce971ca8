"""Errors of a wrong command line, and successive mappings of rewards."""

from __future__ import annotations

import pytest
import yaml

from marble_lightning.cli import main
from marble_lightning.serve import main as serve


@pytest.mark.parametrize(
    ("command", "arguments", "error", "hint"),
    [
        (main, ["fit", "-c", "tiny", "--model.sampling.stepz", "3"], "error: unrecognized arguments", "fit --help."),
        (
            main,
            ["validate", "-c", "tiny", "--model.micro_batch_size", "x"],
            'error: Parser key "model.micro_b',
            "validate --help.",
        ),
        (
            main,
            ["fit"],
            "error: the following arguments are required",
            "--help. Configurations for -c: marble-lightning configs",
        ),
        (main, ["fat"], "error: argument subcommand: invalid choice: 'fat'", "marble-lightning --help."),
        (main, ["export"], "error: the following arguments are required: ckpt_path, to", "marble-lightning export --help"),
        (main, ["configs", "--copi", "x"], "error: unrecognized arguments", "marble-lightning configs --help"),
        (serve, [], "error: the following arguments are required: reward", "marble-lightning-serve --help"),
    ],
)
def test_errors_are_printed_without_the_usage(command, arguments, error, hint, capsys):
    with pytest.raises(SystemExit) as end:
        command(arguments)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(error)
    assert hint in shown.splitlines()[-1]
    assert "usage:" not in shown


def print_config(capsys, *options: str) -> dict:
    """The model's settings after parsing a command line."""
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "tiny", *options, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]


def test_null_removes_a_reward(capsys):
    model = print_config(capsys, "--model.rewards.geneval", "null", "--model.metrics.geneval_accuracy", "null")
    assert [name for name, reward in model["rewards"].items() if reward] == ["pickscore", "hpsv2", "clipscore", "ocr"]
    assert model["metrics"] == {"geneval_accuracy": None}


def test_a_later_mapping_of_nulls_removes_and_any_other_replaces(tmp_path, capsys):
    file = tmp_path / "over.yaml"
    file.write_text("model: {rewards: {geneval: null, ocr: null}, metrics: {}}")
    model = print_config(capsys, "-c", str(file))
    assert [name for name, reward in model["rewards"].items() if reward] == ["pickscore", "hpsv2", "clipscore"]
    assert model["metrics"] == {}
    file.write_text("model: {rewards: {small: {class_path: rewards.JPEGCompressibility}, ocr: null}}")
    assert list(print_config(capsys, "-c", str(file))["rewards"]) == ["small", "ocr"]
