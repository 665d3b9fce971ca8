"""Executes the notebooks: `python -m benchmarks.notebooks`, or with `--fast` in small runs that only show that they work.

Executed copies and the same as HTML go to `runs/notebooks/executed` (`runs/notebooks/fast/executed`); the notebooks
themselves keep no outputs. Finished runs are not repeated, so that an interrupted command continues where it was.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
RUNS = ROOT / "runs/notebooks"


def parameters_cell(notebook: NotebookNode) -> NotebookNode:
    """The cell with the tag `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def set_parameters(notebook: NotebookNode, **values: object) -> None:
    """Replace the values of assignments in the cell of parameters.

    Raises:
        ValueError: There is no such assignment, or there are several.
    """
    cell = parameters_cell(notebook)
    for name, value in values.items():
        assignment = f"{name} = {value!r}".replace("\\", r"\\")  # a template of `re` reads backslashes twice
        cell.source, count = re.subn(rf"^{name} = .*$", assignment, cell.source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"The cell of parameters must have one line `{name} = ...`. Found {count}.")


def execute(file: Path, **parameters: object) -> NotebookNode:
    """Execute a notebook from top to bottom in its folder, and return it with its outputs.

    Args:
        file: The notebook, which stays as it is.
        parameters: Values to set in its cell of parameters.
    """
    notebook = nbformat.read(file, as_version=4)
    set_parameters(notebook, **parameters)
    place = {"metadata": {"path": str(file.parent)}}
    code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of this checkout, before others
    client = NotebookClient(notebook, timeout=None, startup_timeout=600, coalesce_streams=True, resources=place)
    client.execute(env={**os.environ, "PYTHONPATH": code})
    return notebook


def write(notebook: NotebookNode, file: Path) -> None:
    """Write an executed notebook, and the same as HTML beside it."""
    from nbconvert import HTMLExporter  # the tests execute notebooks without it

    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    file.with_suffix(".html").write_text(page, encoding="utf-8")


def main() -> None:
    """Execute the given notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")), help="default: all")
    parser.add_argument("--fast", action="store_true", help="small runs, in a folder of their own")
    options = parser.parse_args()
    runs = RUNS / "fast" if options.fast else RUNS
    for file in map(Path.resolve, options.files):
        notebook = execute(file, FAST=options.fast, FOLDER=os.path.relpath(runs / file.stem, file.parent))
        write(notebook, runs / "executed" / file.name)
        print(runs / "executed" / f"{file.stem}.html")


if __name__ == "__main__":
    main()
