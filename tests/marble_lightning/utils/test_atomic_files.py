"""Atomic files are complete or absent."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from marble_lightning.utils.atomic_files import atomic_write, local_path, remove_unfinished, scratch_for


def test_two_writers_of_the_same_file_do_not_interfere(tmp_path):
    """For example processes of two machines with a shared folder."""
    file = tmp_path / "new" / "one.txt"
    with atomic_write(file) as first, atomic_write(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        assert not file.exists()
    assert file.read_text() == "first"  # the writer that ended last
    assert [path.name for path in file.parent.iterdir()] == ["one.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("before")

    def half() -> None:
        with atomic_write(file) as scratch:
            scratch.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        half()
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def killed_while_writing(file: Path) -> None:
    """Kill a child process while it writes a file."""
    if not (child := os.fork()):
        with atomic_write(file) as scratch:
            scratch.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_scratch_folders_of_killed_processes_are_removed_but_not_of_living_ones(tmp_path):
    killed_while_writing(tmp_path / "one.txt")
    (left,) = tmp_path.iterdir()
    with scratch_for(tmp_path / "one.txt") as scratch:
        remove_unfinished([tmp_path, tmp_path / "nowhere"])
        assert list(tmp_path.iterdir()) == [scratch.parent] and scratch.parent != left
    assert list(tmp_path.iterdir()) == []


def test_other_hidden_files_are_kept(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".one.txt.abcd").write_text("mine")
    remove_unfinished([tmp_path])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("runs/a.ckpt", "runs/a.ckpt"),
        ("file:///runs/a%20b.ckpt", "/runs/a b.ckpt"),
        ("file://localhost/runs/a.ckpt", "/runs/a.ckpt"),
        ("~/a.ckpt", str(Path("~/a.ckpt").expanduser())),
        ("C:/runs/a.ckpt", "C:/runs/a.ckpt"),
    ],
)
def test_local_paths(path, local):
    assert local_path("ckpt_path", path) == Path(local)


@pytest.mark.parametrize(
    "path",
    ["http://a/b.ckpt", "HTTPS://a/b.ckpt", "s3://a/b.ckpt", "simplecache::s3://a/b", "file://a/b", Path("http://a/b")],
)
def test_remote_paths_are_refused(path):
    with pytest.raises(ValueError, match=r"`ckpt_path` must be a file on this machine, .*Found the URL .*download it"):
        local_path("ckpt_path", path)
