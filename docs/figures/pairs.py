"""Writes base and trained above the columns of docs/before_after.png: `python docs/figures/pairs.py`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parents[1]
COLUMNS, HEADER = 8, 34


def labelled(sheet: Image.Image) -> Image.Image:
    """The sheet below a line that names its columns in turn."""
    wide = Image.new("RGB", (sheet.width, sheet.height + HEADER), "white")
    wide.paste(sheet, (0, HEADER))
    pen, step = ImageDraw.Draw(wide), sheet.width / COLUMNS
    for column in range(COLUMNS):
        words, colour = (("base", "#8A5A2B"), ("trained", "#2B6E3F"))[column % 2]
        pen.text(((column + 0.5) * step, HEADER / 2), words, fill=colour, font=ImageFont.load_default(20), anchor="mm")
    return wide


if __name__ == "__main__":
    target = DOCS / "pairs.png"
    labelled(Image.open(DOCS / "before_after.png").convert("RGB")).save(target, optimize=True)
    print(f"{target}, {target.stat().st_size // 1000} kB")
