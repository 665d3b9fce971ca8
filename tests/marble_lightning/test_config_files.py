"""Configurations by name, from any working folder."""

from __future__ import annotations

import pytest
import yaml

from marble_lightning.cli import main
from marble_lightning.command_line import command_line
from marble_lightning.config_files import configurations, locate
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _other_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_file_has_a_name():
    assert set(configurations().values()) == set(CONFIGS.rglob("*.yaml"))
    assert {"tiny", "sd35m", "balancers/pcgrad"} <= configurations().keys()


def test_a_file_takes_precedence_over_a_configuration(tmp_path):
    assert locate("tiny") == str(CONFIGS / "tiny.yaml")
    (tmp_path / "tiny").mkdir()  # a folder is not a configuration
    assert locate("tiny") == str(CONFIGS / "tiny.yaml")
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text("{}")
    assert locate("tiny") == "tiny"


def test_yaml_text_is_unchanged():
    assert locate("seed_everything: 1") == "seed_everything: 1"


def test_the_error_for_an_unknown_name_lists_the_names(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "tinny"])
    shown = capsys.readouterr().err
    assert "tiny, z_image, balancers/advantage_sum, " in shown
    assert f"Found 'tinny', and no such file from {tmp_path}." in shown


def test_tiny_loads_its_weights_and_prompts_from_any_folder():
    cli = command_line(["-c", "tiny", "--trainer.logger", "false"], run=False)
    cli.datamodule.setup("fit")
    cli.model.policy.check_resolution("resolution", 64)
    cli.model.policy.setup(0)
    assert cli.model.policy.identity["model"] == "package:tinyworld/weights/sd3"
    for name in ("pickscore", "hpsv2", "clipscore"):
        cli.model.reward_models[name].setup()
    assert str(CONFIGS.parent) not in cli.model.run_config  # it is copied to checkpoints and exported adapters


def test_configs_lists_names_with_descriptions(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(configurations())
    assert all(len(line.split()) > 3 and "marble-lightning fit" not in line for line in lines)


def test_a_copy_is_a_configuration(tmp_path, capsys):
    main(["configs", "--copy", "tiny", "--to", "mine/my.yaml"])
    assert (tmp_path / "mine/my.yaml").read_text() == (CONFIGS / "tiny.yaml").read_text()
    main(["configs", "--copy", "balancers/pcgrad"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "-c", "mine/my.yaml", "-c", "pcgrad.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["balancer"]["class_path"] == "balancers.PCGrad"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--copy", "tinny"], "`copy` must be the name of a configuration: fast, sd35l, .* Found 'tinny'"),
        (["--copy", "tiny", "--to", "there.yaml"], "`to` must be a file that does not exist yet. Found .*there.yaml"),
        (["--to", "my.yaml"], "`to` must be null if nothing is copied. Found my.yaml"),
    ],
)
def test_refused_copies(options, message, tmp_path):
    (tmp_path / "there.yaml").write_text("kept")
    with pytest.raises(SystemExit, match=f"error: {message}"):  # without a traceback
        main(["configs", *options])
    assert (tmp_path / "there.yaml").read_text() == "kept"


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="`to` must be null"):
        main(["configs", "--to", "my.yaml"])
