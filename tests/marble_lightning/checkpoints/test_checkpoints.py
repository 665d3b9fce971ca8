"""Checkpoint files: atomic writing, errors that name damaged files, and look-up of the last one."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import TO_EVALUATE, TO_EXPORT, TO_FIT, find_corruption, load_checked, newest_usable
from marble_lightning.checkpoints.files import WholeCheckpointIO, last_of, point
from marble_lightning.cli import QUIET, command_line, main
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.run_folder import folder_of_runs
from tests.helpers.command_line import differences, last, options, state

WEIGHTS = torch.arange(8.0)
STATE = {
    "epoch": 1, "global_step": 3, "pytorch-lightning_version": "2.6.6", "state_dict": {"weights": WEIGHTS},
    "loops": {"fit_loop": {}}, "lora": {"rank": 1, "alpha": 1.0, "targets": []}, "base_model": {}, "base_measured": "",
    "base_scores": None, "callbacks": {}, "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
    "lr_schedulers": [],
}  # fmt: skip
"""A minimal checkpoint of `fit`."""


def written(path: Path, age: int = 0, state: Any = STATE) -> Path:
    """Write a checkpoint with a modification time `age` seconds ago."""
    WholeCheckpointIO().save_checkpoint(state, path)
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return path


def test_a_checkpoint_is_read_back(tmp_path):
    loaded = WholeCheckpointIO().load_checkpoint(written(tmp_path / "new/folder/one.ckpt"), weights_only=True)
    assert differences(STATE, loaded) == []
    assert [file.name for file in (tmp_path / "new/folder").iterdir()] == ["one.ckpt"]


def test_flipped_bytes_and_cuts_are_detected(tmp_path):
    """A corrupt file is refused, or loads unchanged because the byte lies between two records."""
    whole, file = written(tmp_path / "whole.ckpt").read_bytes(), tmp_path / "corrupt.ckpt"
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


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = written(tmp_path / "one.ckpt")

    def half(state, stream):
        stream.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=f"The checkpoint {file} must be written to a disk with room for it. Found no space"):
        WholeCheckpointIO().save_checkpoint({}, file)
    assert find_corruption(file) is None and differences(STATE, torch.load(file)) == []
    assert newest_usable(tmp_path / "other.ckpt") == file


def test_a_link_always_has_a_target(tmp_path, monkeypatch):
    one, two, link = written(tmp_path / "one.ckpt"), written(tmp_path / "two.ckpt"), tmp_path / "last.ckpt"
    point(link, one)
    replace, targets = os.replace, []

    def watched(old, new):
        targets.append(link.resolve())
        replace(old, new)
        targets.append(link.resolve())

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(os, "remove", None)
    point(link, two)
    assert targets == [one, two] and os.readlink(link) == "two.ckpt"


def cut(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:100])
    return r"its end is missing, or it is no checkpoint \(100 bytes\)"


def flipped(file: Path) -> str:
    content = file.read_bytes()
    at = content.index(WEIGHTS.numpy().tobytes())
    file.write_bytes(content[: at + 9] + b"\xff" + content[at + 10 :])
    return r"its record \S+data/0 does not match its checksum"


def gone(file: Path) -> str:
    file.unlink()
    return "no such file from .*"


@pytest.mark.parametrize("damage", [cut, flipped, gone])
def test_errors_name_a_damaged_checkpoint_and_the_newest_usable_one(tmp_path, damage):
    folder = tmp_path / "version_1/checkpoints"
    damaged, before, _ = (written(folder / f"{age}.ckpt", age) for age in range(3))
    point(folder / "last.ckpt", damaged)
    wrong = damage(damaged)
    with pytest.raises(ValueError, match=rf"Found {damaged}: {wrong}; give the newest whole one: --ckpt_path {before}"):
        WholeCheckpointIO().load_checkpoint(damaged)
    wrong = "it points to 0.ckpt, which is gone" if damage is gone else wrong
    with pytest.raises(ValueError, match=rf"Found {folder}/last\.ckpt: {wrong}; .*--ckpt_path {before}"):
        WholeCheckpointIO().load_checkpoint(folder / "last.ckpt")


@pytest.mark.parametrize("damage", [cut, gone])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_line_names_a_damaged_checkpoint(small, tmp_path, command, damage):
    """Lightning alone would load the unchecked file first."""
    damaged, before = (written(tmp_path / f"{age}.ckpt", age) for age in range(2))
    with pytest.raises(ValueError, match=rf"Found {damaged}: {damage(damaged)}; .*--ckpt_path {before}"):
        main([command, *small, "--ckpt_path", str(damaged)])


def test_paths_that_are_not_checkpoints(small, tmp_path):
    folder = tmp_path / "version_0"
    file = written(folder / "checkpoints/round_0000.ckpt")
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
        file = written(tmp_path / "less.ckpt", state={key: value for key, value in STATE.items() if key != name})
        with pytest.raises(ValueError, match=rf"Found another program's, {file}: without {name}\."):
            load_checked(file, content)
        file = written(tmp_path / "odd.ckpt", state=STATE | {name: {1, 2}})
        with pytest.raises(ValueError, match=rf"Found another program's, {file}: its {name} is a set\."):
            load_checked(file, content)
    weights = written(tmp_path / "weights.ckpt", state={name: STATE[name] for name in TO_EVALUATE})
    if content is TO_FIT:
        with pytest.raises(ValueError, match="without callbacks, optimizer_states, lr_schedulers"):
            load_checked(weights, content)
    else:
        assert load_checked(weights, content)["global_step"] == 3


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
    file = written(tmp_path / "foreign.ckpt", state=state)
    with pytest.raises(ValueError, match=rf"Found another program's, {file}: {wrong}"):
        main([command, *small, "--ckpt_path", str(file)])


@pytest.mark.parametrize(
    "diverged", [{"state_dict": {"weights": WEIGHTS / 0}}, {"optimizer_states": [{"state": {0: {"exp_avg": WEIGHTS / 0}}}]}]
)
def test_a_diverged_checkpoint_is_refused_and_an_earlier_one_offered(tmp_path, diverged):
    before = written(tmp_path / "before.ckpt", age=2)
    written(tmp_path / "foreign.ckpt", age=1, state={"state_dict": {}})  # newer, but not usable
    file = written(tmp_path / "diverged.ckpt", state=STATE | diverged)
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
    with pytest.raises(ValueError, match="Found the URL"):
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
    file = written(tmp_path / "one two.ckpt")
    assert differences(STATE, WholeCheckpointIO().load_checkpoint(file.as_uri())) == []
    cut(file)
    with pytest.raises(ValueError, match="its end is missing"):
        WholeCheckpointIO().load_checkpoint(file.as_uri())


def test_a_checkpoint_of_another_run_is_offered_if_the_run_has_no_other(tmp_path):
    before = written(tmp_path / "version_0/checkpoints/round_0003.ckpt", age=9)
    damaged = written(tmp_path / "version_1/checkpoints/round_0004.ckpt")
    cut(damaged)
    assert newest_usable(damaged) == before
    before.unlink()
    with pytest.raises(ValueError, match="there is no whole one beside it"):
        WholeCheckpointIO().load_checkpoint(damaged)


def test_last_is_the_newest_of_all_runs_of_a_name(tmp_path):
    trainer = Trainer(logger=CSVLogger(tmp_path, "name"), accelerator="cpu")
    assert folder_of_runs(trainer) == tmp_path / "name" and last_of(trainer) is None
    for version, age in enumerate((30, 10, 20)):
        folder = tmp_path / f"name/version_{version}/checkpoints"
        point(folder / "last.ckpt", written(folder / "round_0000.ckpt", age))
    written(tmp_path / "another/version_0/checkpoints/last.ckpt")
    assert last_of(trainer) == tmp_path / "name/version_1/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_rounds": 0}, "`checkpoints.every_n_rounds` must be >= 1. Found 0"),
        ({"keep": 1}, "`checkpoints.keep` must be >= 2, or -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RoundCheckpoint(**settings)


def test_last_from_the_command_line(checkpoints, tmp_path, caplog, capsys):
    """Without a checkpoint the run starts with a warning; with a damaged one the error names another one to resume from."""
    run = [*options(checkpoints, tmp_path), "--ckpt_path", "last"]
    with pytest.raises(ValueError, match=rf"Found `last`, and no run in {tmp_path}/tiny has a last\.ckpt"):
        main(["validate", *run])
    main(["fit", *run])
    assert f"no run in {tmp_path}/tiny has a last.ckpt yet, so this one begins with the first round" in caplog.text
    files = sorted(file.name for file in last(tmp_path).parent.iterdir())
    assert files == ["last.ckpt", "round_0001.ckpt", "round_0002.ckpt"]
    complete = state(last(tmp_path))
    capsys.readouterr()
    main(["validate", *run])
    assert "change" in capsys.readouterr().out  # from the base scores in the checkpoint

    cut(last(tmp_path).resolve())
    with pytest.raises(ValueError, match=r"last\.ckpt: its end is missing.*--ckpt_path \S+round_0001\.ckpt") as error:
        main(["fit", *run])
    main(["fit", *run[:-1], str(error.value).split()[-1]])
    newest = max(tmp_path.glob("tiny/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    assert differences(complete, state(newest)) == []


@pytest.mark.parametrize("room_for", [1, 0])
def test_a_full_disk(checkpoints, tmp_path, monkeypatch, caplog, room_for):
    """Messages name the file that could not be written, and the newest existing one."""
    save, written_files = torch.save, []

    def full(state: Any, stream: Any) -> None:
        if not isinstance(stream, io.BytesIO):
            if len(written_files) == room_for:
                raise OSError(28, "No space left on device")
            written_files.append(stream)
        save(state, stream)

    monkeypatch.setattr(torch, "save", full)
    folder = last(tmp_path).parent
    with pytest.raises(
        OSError, match=rf"The checkpoint {folder}/round_000{room_for}\.ckpt must be written to a disk with room"
    ):
        main(["fit", *options(checkpoints, tmp_path)])
    rounds = room_for + 1
    file = f"{folder}/before_round_000{rounds}.ckpt"
    assert f"after {rounds} complete round(s), and that state is lost. The checkpoint {file} must" in caplog.text
    newest = (
        f"Resume from the newest checkpoint: --ckpt_path {folder}/round_0000.ckpt"
        if room_for
        else "There is none to resume from."
    )
    assert newest in caplog.text
    assert not room_for or find_corruption(last(tmp_path)) is None
    assert all(file.suffix == ".ckpt" for file in folder.glob("*"))


def test_the_last_round_has_a_checkpoint_at_any_interval(checkpoints, tmp_path):
    main(["fit", *options(checkpoints, tmp_path, **{"checkpoints.every_n_rounds": 2})])
    files = sorted(file.name for file in last(tmp_path).parent.iterdir())
    assert files == ["last.ckpt", "round_0001.ckpt", "round_0002.ckpt"]
    assert last(tmp_path).resolve().name == "round_0002.ckpt" and state(last(tmp_path))["global_step"] == 6
