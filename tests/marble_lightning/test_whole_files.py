"""Files that are there whole or not at all."""

from __future__ import annotations

import pytest

from marble_lightning.whole_files import written_whole


def test_two_who_write_the_same_file_do_not_meet(tmp_path):
    """As processes of two machines may, in a folder they share."""
    file = tmp_path / "new" / "one.txt"
    with written_whole(file) as first, written_whole(file) as second:
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
        with written_whole(file) as beside:
            beside.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        half()
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
