"""Executes the notebooks of this repository and stores their outputs in them: `python -m benchmarks.notebooks`.

The documentation shows the stored outputs. Each notebook keeps a digest of the code that made them, so that a test finds
outputs that are out of date. Text may be edited without executing again. Finished fits in `runs/` are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"


def digest(notebook: NotebookNode) -> str:
    """SHA-256 of the source of all code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()


def execute(file: Path) -> None:
    """Execute one notebook from top to bottom and store its outputs and its digest in the same file."""
    notebook = nbformat.read(file, as_version=4)
    place = {"metadata": {"path": str(file.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=place).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings of libraries are about this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["executed"] = digest(notebook)
    notebook.metadata.language_info = {"name": "python"}  # its version and editor modes say nothing about the outputs
    nbformat.write(notebook, file)
    print(f"{file}, {file.stat().st_size // 1000} kB")


def main() -> None:
    """Execute the given notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")), help="notebooks; default: all"
    )
    for file in parser.parse_args().files:
        execute(file)


if __name__ == "__main__":
    main()
