"""Checkpoints that are damaged, incomplete, elsewhere or of another program are refused, with one that can be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from marble_lightning.checkpoints.content import TO_EVALUATE, TO_EXPORT, TO_FIT, find_corruption, load_checked, newest_usable
from marble_lightning.checkpoints.files import WholeCheckpointIO, point
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET, command_line
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.checkpoint_files import STATE, WEIGHTS, flip_bits, remove, truncate, write_checkpoint
from tests.helpers.command_line import differences


def test_flipped_bytes_and_cuts_are_detected(tmp_path):
    """A corrupt file is refused, or loads unchanged because the byte lies between two records."""
    whole, file = write_checkpoint(tmp_path / "whole.ckpt").read_bytes(), tmp_path / "corrupt.ckpt"
    undetected = 0
    for index in range(0, len(whole), 3):
        file.write_bytes(whole[:index])
        assert find_corruption(file)
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 0x55]) + whole[index + 1 :])
        try:
            loaded = WholeCheckpointIO().load_checkpoint(file)
        except ValueError:
            continue
        assert differences(STATE, loaded) == []
        undetected += 1
    assert undetected < len(whole) / 6


@pytest.mark.parametrize("damage", [truncate, flip_bits, remove])
def test_errors_name_a_damaged_checkpoint_and_the_newest_usable_one(tmp_path, damage):
    folder = tmp_path / "version_1/checkpoints"
    damaged, before, _ = (write_checkpoint(folder / f"{age}.ckpt", age) for age in range(3))
    point(folder / "last.ckpt", damaged)
    wrong = damage(damaged)
    with pytest.raises(ValueError, match=rf"Found {damaged}: {wrong}; give the newest whole one: --ckpt_path {before}"):
        WholeCheckpointIO().load_checkpoint(damaged)
    wrong = "it points to 0.ckpt, which is gone" if damage is remove else wrong
    with pytest.raises(ValueError, match=rf"Found {folder}/last\.ckpt: {wrong}; .*--ckpt_path {before}"):
        WholeCheckpointIO().load_checkpoint(folder / "last.ckpt")


@pytest.mark.integration
@pytest.mark.parametrize("damage", [truncate, remove])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_line_names_a_damaged_checkpoint(small, tmp_path, command, damage):
    """Lightning alone would load the unchecked file first."""
    damaged, before = (write_checkpoint(tmp_path / f"{age}.ckpt", age) for age in range(2))
    with pytest.raises(ValueError, match=rf"Found {damaged}: {damage(damaged)}; .*--ckpt_path {before}"):
        main([command, *small, "--ckpt_path", str(damaged)])


def test_paths_that_are_not_checkpoints(small, tmp_path):
    folder = tmp_path / "version_0"
    file = write_checkpoint(folder / "checkpoints/round_0000.ckpt")
    point(folder / "checkpoints/last.ckpt", file)
    with pytest.raises(ValueError, match=rf"must be a file. Found the folder {folder}; give {folder}/checkpoints/last.ckpt"):
        main(["validate", *small, "--ckpt_path", str(folder)])
    for word in ("best", "hpc", "registry:mine"):
        with pytest.raises(ValueError, match=f"`ckpt_path` must be a file, or last. Found {word}"):
            main(["validate", *small, "--ckpt_path", word])
    torch.save({"made by": Trainer}, file)
    with pytest.raises(ValueError, match=rf"wrote. Found another program's, .*{file}: .*Trainer was not an allowed"):
        WholeCheckpointIO().load_checkpoint(file, weights_only=True)


@pytest.mark.parametrize("content", [TO_EXPORT, TO_EVALUATE, TO_FIT], ids=["export", "validate", "fit"])
def test_each_command_names_missing_entries(tmp_path, content):
    """A checkpoint with weights only can be evaluated and exported, but not resumed."""
    for name in content:
        file = write_checkpoint(tmp_path / "less.ckpt", state={key: value for key, value in STATE.items() if key != name})
        with pytest.raises(ValueError, match=rf"Found another program's, {file}: without {name}\."):
            load_checked(file, content)
        file = write_checkpoint(tmp_path / "odd.ckpt", state=STATE | {name: {1, 2}})
        with pytest.raises(ValueError, match=rf"Found another program's, {file}: its {name} is a set\."):
            load_checked(file, content)
    weights = write_checkpoint(tmp_path / "weights.ckpt", state={name: STATE[name] for name in TO_EVALUATE})
    if content is TO_FIT:
        with pytest.raises(ValueError, match="without callbacks, optimizer_states, lr_schedulers"):
            load_checked(weights, content)
    else:
        assert load_checked(weights, content)["global_step"] == 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("state", "wrong"),
    [
        ([1, 2], "a list instead of a dictionary"),
        (torch.ones(2), "a Tensor instead of a dictionary"),
        ({"layer.weight": torch.ones(2)}, "without lora, state_dict, epoch"),
        (STATE | {"lora": {"rank": 1}}, "its lora is without alpha, targets"),
        (STATE | {"loops": {}}, "its loops are without fit_loop"),
        (STATE | {"state_dict": {"one": 1}}, "its state_dict holds a int under 'one'"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_line_refuses_checkpoints_of_other_programs(small, tmp_path, command, state, wrong):
    file = write_checkpoint(tmp_path / "foreign.ckpt", state=state)
    with pytest.raises(ValueError, match=rf"Found another program's, {file}: {wrong}"):
        main([command, *small, "--ckpt_path", str(file)])


@pytest.mark.parametrize(
    "diverged", [{"state_dict": {"weights": WEIGHTS / 0}}, {"optimizer_states": [{"state": {0: {"exp_avg": WEIGHTS / 0}}}]}]
)
def test_a_diverged_checkpoint_is_refused_and_an_earlier_one_offered(tmp_path, diverged):
    before = write_checkpoint(tmp_path / "before.ckpt", age=2)
    write_checkpoint(tmp_path / "foreign.ckpt", age=1, state={"state_dict": {}})  # newer, but not usable
    file = write_checkpoint(tmp_path / "diverged.ckpt", state=STATE | diverged)
    with pytest.raises(ValueError, match=rf"Found others in 1 of 2 tensors of {file}.* diverged; .*--ckpt_path {before}$"):
        WholeCheckpointIO().load_checkpoint(file)


def no_download(*arguments: Any, **options: Any) -> None:
    pytest.fail("a remote file was loaded")


@pytest.mark.parametrize("url", ["http://elsewhere/a.ckpt", "s3://elsewhere/a.ckpt"])
def test_a_url_is_not_loaded(small, tmp_path, monkeypatch, url):
    """Lightning would run code in such a file, since it loads it with `weights_only=False`."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    for command in ("fit", "validate"):
        with pytest.raises(ValueError, match=f"`ckpt_path` must be a file on this machine.* Found the URL {url}"):
            main([command, *small, "--ckpt_path", url])
    with pytest.raises(SystemExit, match="error: .*Found the URL"):
        main(["export", "--ckpt_path", url, "--to", str(tmp_path / "lora")])
    with pytest.raises(ValueError, match="`policy.init_lora` must be a file on this machine"):
        SD3Policy("x", init_lora=url)


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
def test_a_url_is_not_loaded_in_python(small, tmp_path, monkeypatch):
    """The trainer has no plugin for checkpoints."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    cli = command_line(small, run=False)
    with pytest.raises(ValueError, match="Found the URL http://elsewhere/a.ckpt"):
        cli.trainer.validate(cli.model, cli.datamodule, ckpt_path="http://elsewhere/a.ckpt")


def test_a_file_url_is_checked(tmp_path):
    file = write_checkpoint(tmp_path / "one two.ckpt")
    assert differences(STATE, WholeCheckpointIO().load_checkpoint(file.as_uri())) == []
    truncate(file)
    with pytest.raises(ValueError, match="its end is missing"):
        WholeCheckpointIO().load_checkpoint(file.as_uri())


def test_a_checkpoint_of_another_run_is_offered_if_the_run_has_no_other(tmp_path):
    before = write_checkpoint(tmp_path / "version_0/checkpoints/round_0003.ckpt", age=9)
    damaged = write_checkpoint(tmp_path / "version_1/checkpoints/round_0004.ckpt")
    truncate(damaged)
    assert newest_usable(damaged) == before
    before.unlink()
    with pytest.raises(ValueError, match="there is no other whole one"):
        WholeCheckpointIO().load_checkpoint(damaged)
