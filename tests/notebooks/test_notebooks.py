"""The notebooks hold the outputs of their code, and run from top to bottom with a random model and few rounds."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.notebooks import digest
from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_belong_to_the_code(file):
    notebook = nbformat.read(file, as_version=4)
    assert notebook.metadata.get("executed") == digest(notebook), "the code has changed: `make notebooks` executes it again"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert file.stat().st_size < 700_000


@pytest.mark.integration
def test_compare_balancers(small, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks/compare_balancers.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    options = list(small[2:])  # without `-c ...tiny.yaml`, which the notebook adds itself
    folder = options.index("--trainer.logger.save_dir")
    del options[folder : folder + 2]
    parameters.source = "\n".join(
        [
            'METHODS = {"marble": [], "weighted_sum": ["balancers/weighted_sum"]}',
            "ROUNDS = 2",
            "SEEDS = [0]",
            f"FOLDER = {str(tmp_path)!r}",
            f"OPTIONS = {options!r}",
        ]
    )
    executed = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in item for item in data) == 6  # three figures, and images of the base and of each method
    table = next(item["text/markdown"] for item in data if "| weighted_sum |" in item.get("text/markdown", ""))
    assert "| base |" in table and "| marble |" in table
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "marble/seed_0: MARBLE, refresh_every 5, ema_decay 0.7" in printed
