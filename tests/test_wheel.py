"""What `pip install` brings: all packages, and the configurations, weights and prompts that they need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.integration

PACKAGES = ("balancers", "marble_lightning", "rewards")
USE = """
from marble_lightning.cli import main
from rewards.files import resolve_path
import marble_lightning, pathlib
print(marble_lightning.__file__, pathlib.Path(resolve_path("package:tinyworld/weights/sd3/model_index.json")).is_file())
main(["fit", "-c", "tiny", "-c", "balancers/pcgrad", "--print_config"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built in a copy of the sources: building leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = built.glob("*.whl")
    with ZipFile(file) as opened:
        opened.extractall(built)
    file.unlink()
    return built


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def test_all_files_of_the_packages_and_configs_are_there(wheel):
    wanted = {f"{package}/{file}" for package in PACKAGES for file in files(ROOT / package)}
    wanted |= {f"marble_lightning/configs/{file}" for file in files(ROOT / "configs")}
    assert {file for file in files(wheel) if ".dist-info" not in file} == wanted


def test_configurations_are_found_without_the_repository(wheel, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)}, capture_output=True,
        text=True, timeout=200, check=True,
    )  # fmt: skip
    assert ended.stdout.startswith(f"{wheel}/marble_lightning/__init__.py True\n")
    assert "torchvision" not in ended.stderr  # transformers would warn of image processors that nothing here uses
    assert "class_path: balancers.PCGrad" in ended.stdout and "path: package:tinyworld/weights/sd3" in ended.stdout
