"""Write a folder's model card as a web page, `card.html`, with the sample images where the hub shows them."""

import sys
from html import escape
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # it comes with the extra `docs`

STYLE = """<style>body {font: 15px sans-serif; width: 760px; margin: 2em auto}
td, th {border: 1px solid #ddd; padding: 3px 9px}
table {border-collapse: collapse} div {display: grid; grid-template-columns: repeat(6, 1fr); font-size: 11px}
figure {margin: 4px} figure img {width: 100%} pre {background: #eee; padding: 12px}</style>"""

folder = Path(sys.argv[1])
card = ModelCard.load(folder / "README.md")
samples = [(each["output"]["url"], each["text"]) for each in card.data.widget if "output" in each]
figures = "".join(f'<figure><img src="{escape(url)}">{escape(text)}</figure>' for url, text in samples)
page = MarkdownIt().enable("table").render(card.text).replace("<Gallery />", f"<div>{figures}</div>")
(folder / "card.html").write_text(f"<!doctype html><meta charset=utf-8>{STYLE}{page}", encoding="utf-8")
