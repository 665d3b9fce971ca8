"""The notebooks run from top to bottom, with a random model and few rounds."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_stripped(file):
    cells = nbformat.read(file, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells if cell.cell_type == "code")


def test_compare_balancers(small, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks/compare_balancers.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    options = [
        *small[2:],
        "--gradient_alignment.probe_every",
        "1",
    ]  # without `-c`: the notebook has its own
    folder = options.index("--trainer.logger.save_dir")
    del options[folder : folder + 2]
    parameters.source = "\n".join(
        [
            'METHODS = ["marble", "weighted_sum"]',
            "ROUNDS = 2",
            "SEEDS = [0, 1]",
            f"FOLDER = {str(tmp_path)!r}",
            f"OPTIONS = {options!r}",
        ]
    )
    executed = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in item for item in data) >= 5  # three figures, and a grid of images per method
    table = next(item["text/markdown"] for item in data if "| weighted_sum |" in item.get("text/markdown", ""))
    assert "| base |" in table and "| marble |" in table
    assert any("- marble: MARBLE, refresh_every 10, ema_decay 0.7" in item.get("text/markdown", "") for item in data)
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "probe/reused/fresh" in printed
