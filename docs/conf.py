"""How Sphinx builds these pages: `make docs`, without network, a warning being an error."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

project = "MARBLE Lightning"
author = "the MARBLE Lightning developers"
project_copyright = "the MARBLE Lightning developers, Apache-2.0"

extensions = ["markdown_docstrings", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["_build", "_ext", "examples", "figures"]

html_theme = "furo"
html_title = "MARBLE Lightning"
smartquotes = False  # two hyphens begin an option of the command line and are no dash

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # [text](page.md#heading) finds headings down to this level
nb_execution_mode = "off"  # notebooks are shown without outputs

autodoc_inherit_docstrings = False  # those of Lightning are not about this project
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source"]
add_module_names = False


def place_notebooks() -> None:
    """Copy the notebooks and their table beside the pages."""
    place = HERE / "notebooks"
    shutil.rmtree(place, ignore_errors=True)  # Sphinx would warn about a notebook that no longer exists
    place.mkdir()
    for file in [*(ROOT / "notebooks").glob("*.ipynb"), ROOT / "notebooks/README.md"]:
        shutil.copyfile(file, place / file.name)


place_notebooks()
