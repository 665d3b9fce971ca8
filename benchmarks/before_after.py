"""A sheet of held-out images before and after a run, with the same prompts and noise, evenly spaced and not hand-picked.

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
    """Read what `predict` wrote: prompt, source, scores and file of each image, in the order of the prompts."""
    return [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def evenly_spaced(images: list[dict[str, Any]], per_source: int) -> list[dict[str, Any]]:
    """Choose `per_source` evenly spaced records of each prompt source."""
    chosen = []
    for source in dict.fromkeys(record["source"] for record in images):
        of_source = [record for record in images if record["source"] == source]
        count = min(per_source, len(of_source))
        chosen += [of_source[int(index)] for index in torch.linspace(0, len(of_source) - 1, count)]
    return chosen


def read_image(file: Path) -> Tensor:
    """Read a PNG as (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255


def main() -> None:
    """Pair the images of two `predict` folders on one sheet, or show those of one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="before, and after")
    parser.add_argument("--per-source", type=int, default=8)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    chosen = evenly_spaced(records(options.folders[0]), options.per_source)
    images, texts = [], []
    for record in chosen:
        for folder in options.folders:
            images.append(read_image(folder / record["file"]))
            texts.append(record["prompt"] if folder == options.folders[0] else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    to_image(grid(images, texts, options.columns)).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
