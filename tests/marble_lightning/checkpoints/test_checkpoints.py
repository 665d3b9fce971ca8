"""Checkpoint files: atomic writing, errors that name damaged files, and look-up of the last one."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import find_corruption, newest_usable
from marble_lightning.checkpoints.files import WholeCheckpointIO, last_of, point
from marble_lightning.cli import main
from marble_lightning.run_folder import folder_of_runs
from tests.helpers.checkpoint_files import STATE, truncate, write_checkpoint
from tests.helpers.command_line import differences, last, options, state


def test_a_checkpoint_is_read_back(tmp_path):
    loaded = WholeCheckpointIO().load_checkpoint(write_checkpoint(tmp_path / "new/folder/one.ckpt"), weights_only=True)
    assert differences(STATE, loaded) == []
    assert [file.name for file in (tmp_path / "new/folder").iterdir()] == ["one.ckpt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = write_checkpoint(tmp_path / "one.ckpt")

    def half(state, stream):
        stream.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=f"The checkpoint {file} must be written to a disk with room for it. Found no space"):
        WholeCheckpointIO().save_checkpoint({}, file)
    assert find_corruption(file) is None and differences(STATE, torch.load(file)) == []
    assert newest_usable(tmp_path / "other.ckpt") == file


def test_a_link_always_has_a_target(tmp_path, monkeypatch):
    one, two, link = write_checkpoint(tmp_path / "one.ckpt"), write_checkpoint(tmp_path / "two.ckpt"), tmp_path / "last.ckpt"
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


def test_last_is_the_newest_of_all_runs_of_a_name(tmp_path):
    trainer = Trainer(logger=CSVLogger(tmp_path, "name"), accelerator="cpu")
    assert folder_of_runs(trainer) == tmp_path / "name" and last_of(trainer) is None
    for version, age in enumerate((30, 10, 20)):
        folder = tmp_path / f"name/version_{version}/checkpoints"
        point(folder / "last.ckpt", write_checkpoint(folder / "round_0000.ckpt", age))
    write_checkpoint(tmp_path / "another/version_0/checkpoints/last.ckpt")
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


@pytest.mark.integration
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

    truncate(last(tmp_path).resolve())
    with pytest.raises(ValueError, match=r"last\.ckpt: its end is missing.*--ckpt_path \S+round_0001\.ckpt") as error:
        main(["fit", *run])
    main(["fit", *run[:-1], str(error.value).split()[-1]])
    newest = max(tmp_path.glob("tiny/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    assert differences(complete, state(newest)) == []


@pytest.mark.integration
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
