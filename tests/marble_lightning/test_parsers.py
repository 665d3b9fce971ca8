"""What a wrong command line is told, and mappings of rewards that follow each other."""

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
def test_the_error_comes_first_and_the_usage_on_request(command, arguments, error, hint, capsys):
    with pytest.raises(SystemExit) as end:
        command(arguments)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(error)
    assert hint in shown.splitlines()[-1]
    assert "usage:" not in shown


def printed(capsys, *options: str) -> dict:
    """The model's settings that a command line means."""
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "tiny", *options, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]


def test_null_drops_a_reward(capsys):
    found = printed(capsys, "--model.rewards.geneval", "null", "--model.metrics.geneval_accuracy", "null")
    assert [name for name, reward in found["rewards"].items() if reward] == ["pickscore", "hpsv2", "clipscore", "ocr"]
    assert found["metrics"] == {"geneval_accuracy": None}


def test_a_later_file_of_nulls_drops_these_and_any_other_replaces_all(tmp_path, capsys):
    file = tmp_path / "over.yaml"
    file.write_text("model: {rewards: {geneval: null, ocr: null}, metrics: {}}")
    found = printed(capsys, "-c", str(file))
    assert [name for name, reward in found["rewards"].items() if reward] == ["pickscore", "hpsv2", "clipscore"]
    assert found["metrics"] == {}
    file.write_text("model: {rewards: {small: {class_path: rewards.JPEGCompressibility}, ocr: null}}")
    assert list(printed(capsys, "-c", str(file))["rewards"]) == ["small", "ocr"]
