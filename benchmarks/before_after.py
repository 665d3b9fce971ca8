"""One sheet of held-out images before and after a run: same prompts, same noise, evenly taken, none chosen by eye.

```
marble-lightning predict -c tiny --predictions.folder runs/before
marble-lightning predict -c tiny --ckpt_path ... --predictions.folder runs/after
python -m benchmarks.before_after runs/before runs/after --out docs/before_after.png
```
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marble_lightning.utils.images import grid, to_image


def records(folder: Path) -> list[dict[str, Any]]:
    """What `predict` wrote there: prompt, source, scores and file of each image, in the order of the prompts."""
    return [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def evenly(found: list[dict[str, Any]], per_source: int) -> list[dict[str, Any]]:
    """That many of each prompt source, evenly spaced."""
    chosen = []
    for source in dict.fromkeys(record["source"] for record in found):
        own = [record for record in found if record["source"] == source]
        chosen += [own[int(place)] for place in torch.linspace(0, len(own) - 1, min(per_source, len(own)))]
    return chosen


def picture(file: Path) -> Tensor:
    """A PNG as (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255


def main() -> None:
    """Pair two folders of `predict` into one sheet; with one folder, show it alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="before, and after")
    parser.add_argument("--per-source", type=int, default=8)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    chosen = evenly(records(options.folders[0]), options.per_source)
    pictures, texts = [], []
    for record in chosen:
        for folder in options.folders:
            pictures.append(picture(folder / record["file"]))
            texts.append(record["prompt"] if folder == options.folders[0] else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    to_image(grid(pictures, texts, options.columns)).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
