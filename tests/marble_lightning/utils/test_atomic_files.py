"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from marble_lightning.utils.atomic_files import atomic_write, local_path, remove_unfinished, scratch_for


def test_two_who_write_the_same_file_do_not_meet(tmp_path):
    """As processes of two machines may, in a folder they share."""
    file = tmp_path / "new" / "one.txt"
    with atomic_write(file) as first, atomic_write(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        assert not file.exists()
    assert file.read_text() == "first"  # which ended last
    assert [left.name for left in file.parent.iterdir()] == ["one.txt"]


def test_one_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("before")

    def half() -> None:
        with atomic_write(file) as beside:
            beside.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        half()
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def killed_while_writing(file: Path) -> None:
    """A child process is killed half-way through a file."""
    if not (child := os.fork()):
        with atomic_write(file) as beside:
            beside.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_kill_leaves_is_removed_and_what_is_being_written_is_not(tmp_path):
    killed_while_writing(tmp_path / "one.txt")
    (left,) = tmp_path.iterdir()
    with scratch_for(tmp_path / "one.txt") as beside:
        remove_unfinished([tmp_path, tmp_path / "nowhere"])
        assert list(tmp_path.iterdir()) == [beside.parent] and beside.parent != left
    assert list(tmp_path.iterdir()) == []


def test_what_others_keep_hidden_stays(tmp_path):
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
def test_paths_of_this_machine(path, local):
    assert local_path("ckpt_path", path) == Path(local)


@pytest.mark.parametrize(
    "path",
    ["http://a/b.ckpt", "HTTPS://a/b.ckpt", "s3://a/b.ckpt", "simplecache::s3://a/b", "file://a/b", Path("http://a/b")],
)
def test_paths_of_elsewhere(path):
    with pytest.raises(ValueError, match=r"`ckpt_path` must be a file on this machine, .*Found the URL .*download it"):
        local_path("ckpt_path", path)
