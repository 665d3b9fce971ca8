"""Errors of a wrong command line, and successive mappings of rewards."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from marble_lightning.cli import main
from marble_lightning.command_line import command_line
from marble_lightning.parsers import without_amortize
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


SECTIONS = {
    "alarms": ("image_drift", "factor", 3.5),
    "pictures": ("held_out_images", "count", 5),
    "harmony": ("gradient_alignment", "probe_every", 7),
}
"""New name, a setting and its value, by the old name of a section."""


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    """The parser of the command line without subcommands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["marble-lightning"])
        return command_line(["-c", "tiny"], run=False).parser


def renamings(warnings: pytest.WarningsRecorder) -> list[str]:
    """The messages of warnings of old names."""
    return [str(warning.message) for warning in warnings if issubclass(warning.category, FutureWarning)]


FORMS = ("words", "equals", "section", "text", "dotted", "file")
"""All sections are renamed by the same code, so one of them in every form, and every one in a file, show most."""


@pytest.mark.parametrize(
    ("old", "form"),
    [
        *(("alarms", form) for form in FORMS),
        *((old, "file") for old in SECTIONS if old != "alarms"),
        *(pytest.param(old, form, marks=pytest.mark.slow) for old in SECTIONS if old != "alarms" for form in FORMS[:-1]),
    ],
)
def test_an_old_section_sets_the_new_one_and_warns_once(parser, old, form, tmp_path):
    new, setting, value = SECTIONS[old]
    (tmp_path / "old.yaml").write_text(f"{old}:\n  {setting}: {value}\n")
    words = {
        "words": [f"--{old}.{setting}", str(value)],
        "equals": [f"--{old}.{setting}={value}"],
        "section": [f"--{old}", f"{{{setting}: {value}}}"],
        "text": ["-c", f"{{{old}: {{{setting}: {value}}}}}"],
        "dotted": ["-c", f"{old}.{setting}: {value}"],
        "file": ["-c", str(tmp_path / "old.yaml")],
    }[form]
    with pytest.warns(FutureWarning, match=rf"`(--)?{old}` is now `(--)?{new}`") as warnings:
        config = parser.parse_args(["-c", "tiny", *words])
    assert len(renamings(warnings)) == 1
    assert config[new][setting] == value
    assert old not in config


@pytest.mark.parametrize("old", SECTIONS)
def test_an_old_section_of_a_subcommand_in_a_file(old, tmp_path, capsys):
    new, setting, value = SECTIONS[old]
    (tmp_path / "old.yaml").write_text(f"fit:\n  {old}:\n    {setting}: {value}\n")
    with pytest.warns(FutureWarning, match=f"`{old}` is now `{new}`"), pytest.raises(SystemExit):
        main(["-c", str(tmp_path / "old.yaml"), "fit", "-c", "tiny", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)[new][setting] == value


@pytest.mark.parametrize("old", SECTIONS)
def test_a_section_under_both_names_is_refused(parser, old, capsys):
    new, setting, value = SECTIONS[old]
    section = f"{{{setting}: {value}}}"
    for words, prefix in (
        ([f"--{old}.{setting}", str(value), f"--{new}", section], "--"),
        (["-c", f"{{{new}: {section}, {old}: {section}}}"], ""),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["-c", "tiny", *words])
        assert f"`{prefix}{new}` must be given once. Found also its old name `{prefix}{old}`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--ckpt_path", "a", "--to", "b", "--which", "ema", "--adapter", "ema"])
    assert "`--adapter` must be given once. Found also its old name `--which`" in capsys.readouterr().err


def test_later_words_override_an_old_section_of_a_file(parser, tmp_path):
    (tmp_path / "old.yaml").write_text("alarms: {factor: 3, patience: 4}")
    with pytest.warns(FutureWarning, match="`alarms` is now `image_drift`"):
        config = parser.parse_args(["-c", "tiny", "-c", str(tmp_path / "old.yaml"), "--image_drift.factor", "5"])
    assert (config.image_drift.factor, config.image_drift.patience) == (5, 4)


def test_the_configuration_of_an_earlier_run(parser, tmp_path):
    """`config.yaml` in the folder of a run that had the old names."""
    config = yaml.safe_load(parser.dump(parser.parse_args(["-c", "tiny"]), skip_none=False))
    earlier = {{new: old for old, (new, *_) in SECTIONS.items()}.get(name, name): value for name, value in config.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier, sort_keys=False))
    with pytest.warns(FutureWarning) as warnings:
        again = parser.parse_args(["-c", str(tmp_path / "config.yaml")])
    assert len(renamings(warnings)) == len(SECTIONS)
    assert yaml.safe_load(parser.dump(again, skip_none=False)) == config


def test_the_removed_option_of_an_earlier_run(parser, tmp_path, capsys):
    """`amortize: raw` is what happens without the option; the other value is refused by name."""
    config = {"balancer": {"class_path": "balancers.MARBLE", "init_args": {"refresh_every": 7, "amortize": "raw"}}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert parser.parse_args(["-c", "tiny", "-c", str(file)]).balancer.init_args.refresh_every == 7
    assert without_amortize({"fit": config})["fit"]["balancer"]["init_args"] == {"refresh_every": 7}
    file.write_text(file.read_text().replace("raw", "scaled"))
    with pytest.raises(SystemExit):
        parser.parse_args(["-c", "tiny", "-c", str(file)])
    assert "`amortize` must be left out: weights multiply raw gradients" in capsys.readouterr().err
