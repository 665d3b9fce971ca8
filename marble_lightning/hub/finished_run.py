"""What a model card reads from the folder of a checkpoint's run: held-out scores and images of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from marble_lightning.evaluation.results import read
from marble_lightning.utils.run_files import RESULTS

SAMPLES = 6
"""Largest number of sample images in a card."""


class Sample(NamedTuple):
    """An image of the run, with its text and its file name in the card's folder."""

    file: Path
    text: str
    name: str
    is_prompt: bool
    """Whether the text is the prompt of the image; otherwise the image shows several prompts."""


def results_of(checkpoint: Mapping[str, Any], file: Path, adapter: str) -> dict[str, Any] | None:
    """The results of a checkpoint's run, if they are scores of this adapter at this step; otherwise None.

    Args:
        checkpoint: Content of the checkpoint.
        file: Its file, in the run's folder `checkpoints`.
        adapter: `ema` or `trained`.
    """
    folder = file.absolute().parents[1]
    if not (folder / RESULTS).is_file():
        return None
    results = read(folder)
    evaluated = results.get("evaluated", {})
    same = (evaluated.get("optimizer_step"), evaluated.get("adapter")) == (checkpoint["global_step"], adapter)
    return results if same else None


def samples_of(file: Path, adapter: str, step: int) -> list[Sample]:
    """Images in a run's folder that this adapter of a checkpoint generated.

    They are those that `predict --predictions.folder RUN/predictions` wrote, and the sheet of held-out images.

    Args:
        file: The checkpoint, in the run's folder `checkpoints`.
        adapter: `ema` or `trained`.
        step: Optimizer step of the checkpoint.
    """
    folder, samples = file.absolute().parents[1], list[Sample]()
    for image in sorted((folder / "predictions").glob("*.png")):
        with Image.open(image) as opened:
            info = opened.info
        if (info.get("checkpoint"), info.get("adapter")) == (str(file.resolve()), adapter) and len(samples) < SAMPLES:
            samples.append(Sample(image, info["prompt"], f"images/{image.name}", is_prompt=True))
    sheet = folder / f"held_out_{step:06d}.png"
    if sheet.is_file():
        samples.append(
            Sample(sheet, "Held-out prompts, with the scores of each image", "images/held_out.png", is_prompt=False)
        )
    return samples
