"""A user's file of the name of a package is named in the error."""

from __future__ import annotations

import sys

import pytest

from marble_lightning._shadowing import check_packages


@pytest.mark.parametrize("file", ["rewards.py", "balancers/__init__.py", "rewards/mine.py"])
def test_a_module_that_shadows_a_package_is_named(tmp_path, monkeypatch, file):
    check_packages()
    shadow = tmp_path / file
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("")
    name = file.split("/")[0].removesuffix(".py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)
    if file == "rewards/mine.py":  # a folder without `__init__.py` shadows nothing
        check_packages()
        return
    with pytest.raises(ImportError, match=rf"`{name}` must be the package .* Found {tmp_path}/.*Rename it"):
        check_packages()
