"""The notebooks are stored without outputs, and run from top to bottom in their fast mode."""

from __future__ import annotations

import nbformat
import pytest

from benchmarks.notebooks import FOLDER, execute, parameters_cell, set_parameters
from tests.helpers import ROOT

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@each
def test_outputs_are_stripped(file):
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    kept = [cell for cell in code if cell.outputs or cell.execution_count is not None]
    assert not kept, f"remove outputs: nbstripout {file.relative_to(ROOT)}"


@each
def test_the_first_code_cell_has_the_parameters(file):
    notebook = nbformat.read(file, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    values: dict[str, object] = {}
    exec(first.source, values)
    assert first is parameters_cell(notebook)
    assert values["FAST"] is False and values["FOLDER"] == f"../runs/notebooks/{file.stem}"


def test_parameters_are_replaced():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("FAST = False  # or True\nFOLDER = 'a'")])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    set_parameters(notebook, FAST=True, FOLDER="b\\c")
    assert notebook.cells[0].source == "FAST = True\nFOLDER = 'b\\\\c'"
    with pytest.raises(ValueError, match=r"one line `SEEDS = ...`. Found 0"):
        set_parameters(notebook, SEEDS=[0])


@each
def test_the_table_has_its_purpose(file):
    assert f"| [`{file.stem}`]({file.name}) |" in (FOLDER / "README.md").read_text()


@pytest.mark.integration
@each
def test_it_runs_in_fast_mode(file, tmp_path):
    notebook = execute(file, FAST=True, FOLDER=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert list(tmp_path.rglob("results.json"))
