"""Docstrings are written in Markdown, so that they read well in an editor; Sphinx reads reStructuredText.

Before Napoleon sees a docstring, code in backticks, mathematics in dollars and indented code become reStructuredText.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import dedent, indent
from typing import Any

INLINE = re.compile(
    r"(?P<kept>``[^`]+``|:[\w:]+:`[^`]+`|`[^`]+`_)"
    r"|`(?P<code>[^`]+)`"
    r"|(?<![\w$])\$(?P<math>[^$]+)\$(?![\w$])"
    r"|(?P<special>[*|\\])"
)
DISPLAY = re.compile(r"^[ ]*\$\$(.+?)\$\$[ ]*$", re.DOTALL | re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    """Register the conversion, before Napoleon's, whose priority is 500."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring in place."""
    lines[:] = converted("\n".join(lines)).split("\n")


def converted(text: str) -> str:
    """A docstring as reStructuredText.

    >>> converted("The norm $|g|$ of `g`.")
    'The norm :math:`|g|` of ``g``.'
    """
    pieces = DISPLAY.split(text)  # text, display, text, ...
    return "".join(_display(piece) if index % 2 else "".join(_blocks(piece)) for index, piece in enumerate(pieces))


def _display(tex: str) -> str:
    return "\n.. math::\n\n" + indent(dedent(tex).strip(), "    ") + "\n"


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs and what is between them; doctests and indented code stay as they are."""
    parts, code = re.split(r"(\n[ ]*\n)", text), False
    for index, part in enumerate(parts):
        if index % 2 or part.lstrip().startswith(">>>"):
            yield part
            continue
        code = code and part.startswith("    ")
        if code:
            yield part
            continue
        following = parts[index + 2] if index + 2 < len(parts) else ""
        code = part.endswith(":") and not part.startswith(" ") and following.startswith("    ")
        yield INLINE.sub(_inline, part) + (":" if code else "")


def _inline(match: re.Match[str]) -> str:
    if match["code"]:
        return f"``{' '.join(match['code'].split())}``"
    if match["math"]:
        return f":math:`{' '.join(match['math'].split())}`"
    return match["kept"] or f"\\{match['special']}"
