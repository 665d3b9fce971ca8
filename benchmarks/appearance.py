"""How images change in ways that no reward tells: `python -m benchmarks.appearance RUN...`, base against trained.

For each run, the folder that `fit` prints at its end, the base and the trained adapter sample the same held-out prompts with
the same noise. The table has the image statistics, the shares of black pixels and of flat images, and the colours in images
of prompts that name none: the trained mean, the factor to the base, and the change with its standard error over prompts.
Bold: more than a factor 1.5 from the base. Images are kept in the run's folder, and are not sampled again. Other options
are passed to `predict`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.before_after import read_image, records
from benchmarks.fits import ComparisonError, call_marble
from benchmarks.stage_tables import table
from marble_lightning.evaluation.image_statistics import NAMES, image_statistics
from marble_lightning.lab.report.tables import factor
from marble_lightning.tinyworld import ColourBlobs
from marble_lightning.tinyworld.scenes import PAINTS
from marble_lightning.utils.run_files import CONFIG

RANGE = 1.5
"""A factor beyond this, or below its inverse, is marked."""
FLAT = 8 / 255
"""Standard deviation of the pixels below which an image counts as flat."""
NO_COLOUR = "other colours"
"""Pixels that are near no colour of the palette, such as backgrounds."""
PALETTE = {name: colour for name, colour in PAINTS.items() if name != "white"}
"""Colours to look for; some backgrounds are nearly white."""
CATEGORIES = (*PALETTE, NO_COLOUR)


def nearest_colours(images: Float[Tensor, "image 3 height width"]) -> Int[Tensor, "image height width"]:
    """Index in `CATEGORIES` of the colour nearest to each pixel, by the rule of the detector `ColourBlobs`."""
    colours = torch.tensor(list(PALETTE.values()), dtype=torch.float32) / 255
    pixels = images.float().permute(0, 2, 3, 1)
    distances = torch.stack([(pixels - colour).norm(dim=3) for colour in colours])
    least, nearest = distances.min(0)
    return torch.where(least < ColourBlobs().reach / 255, nearest, len(PALETTE))


def is_flat(images: Float[Tensor, "image 3 height width"]) -> Bool[Tensor, " image"]:
    """Whether nothing can be seen on an image: its pixels have a standard deviation below 8/255.

    The deviation is that of each channel over the pixels, as a root mean square over the channels.
    """
    return images.float().flatten(2).var(2, correction=0).mean(1).sqrt() < FLAT


def names_a_colour(prompt: str) -> bool:
    """Whether a prompt names a colour of the palette.

    >>> names_a_colour("a photo of a Red circle"), names_a_colour("a photo of a circle, coloured")
    (True, False)
    """
    return not set(PAINTS).isdisjoint(re.findall("[a-z]+", prompt.lower()))


def appearance(images: Float[Tensor, "image 3 height width"], prompts: Sequence[str], count: int) -> dict[str, Tensor]:
    """All figures of a set of images, by name: (prompt,) means over the images of each prompt.

    Args:
        images: Images in [0, 1], `count` of each prompt, one after another.
        prompts: The prompt of each image.
        count: Images of each prompt, >= 2.

    Returns:
        Figures of all prompts; shares of colours are of the prompts that name none.

    Raises:
        ComparisonError: No prompt is without a colour.
    """
    groups = torch.arange(len(images)) // count
    figures = dict(zip(NAMES, image_statistics(images, groups).double().T, strict=True))
    nearest = nearest_colours(images).unflatten(0, (-1, count)).flatten(1)  # pixels of each prompt
    figures["black pixels"] = (nearest == CATEGORIES.index("black")).double().mean(1)
    figures["flat images"] = is_flat(images).double().unflatten(0, (-1, count)).mean(1)
    free = torch.tensor([not names_a_colour(prompt) for prompt in prompts[::count]])
    if not free.any():
        raise ComparisonError("Some prompts must name no colour. Found none; use more `--prompts`.")
    shares = nearest[free][:, :, None].eq(torch.arange(len(CATEGORIES))).double().mean(1)
    return figures | {f"no colour named: {name}": share for name, share in zip(CATEGORIES, shares.T, strict=True)}


def appearance_table(figures: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> str:
    """Each figure of the base, a mean over the runs, and of each run with its factor to its own base and its change.

    Args:
        figures: (prompt,) values of the base and the trained ones, by run and name.
    """
    rows = []
    for name in next(iter(figures.values()))[0]:
        cells = []
        for base, trained in figures.values():
            ratio = factor(float(base[name].mean()), float(trained[name].mean()))
            change = trained[name] - base[name]
            error = float(change.std()) / len(change) ** 0.5
            text = f"{float(trained[name].mean()):.3f} (x {ratio:.2f}, {float(change.mean()):+.3f} ± {error:.3f})"
            cells.append(text if 1 / RANGE <= ratio <= RANGE else f"**{text}**")
        mean = sum(float(base[name].mean()) for base, _ in figures.values()) / len(figures)
        rows.append([name, f"{mean:.3f}", *cells])
    return table(["", "base", *figures], rows)


def sample(run: Path, adapter: str, options: argparse.Namespace, extra: Sequence[str]) -> dict[str, Tensor]:
    """The figures of a run's images, which are sampled unless they are there.

    Args:
        run: The run's folder.
        adapter: `ema` or `trained`; `none` for the base.
        options: Number of prompts and images.
        extra: Further arguments of `predict`.

    Raises:
        ComparisonError: The folder has no finished run, or sampling failed.
    """
    config, checkpoint = run / CONFIG, run / "checkpoints" / "last.ckpt"
    if not config.exists() or not checkpoint.exists():
        raise ComparisonError(
            f"RUN must be a folder of `fit` with {CONFIG} and a checkpoint. Found none in {run.resolve()}."
        )
    output = run / f"appearance_{options.prompts}_{options.images}" / adapter
    if not (output / "images.jsonl").exists():
        arguments = ["predict", "-c", str(config), "--ckpt_path", "null" if adapter == "none" else str(checkpoint)]
        arguments += [
            "--model.policy.adapter",
            adapter,
            "--predictions.folder",
            str(output),
            "--predictions.scores",
            "false",
        ]
        arguments += ["--data.predict_images", str(options.images), "--data.held_out_per_source", str(options.prompts)]
        call_marble([*arguments, "--trainer.logger", "false", *extra], output.with_suffix(".txt"), f"images of {run}")
    found = records(output)
    images = torch.stack([read_image(output / record["file"]) for record in found])
    return appearance(images, [record["prompt"] for record in found], options.images)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of `fit`")
    parser.add_argument("--adapter", default="ema", choices=("ema", "trained"))
    parser.add_argument("--prompts", type=int, default=42, help="held-out prompts of each source")
    parser.add_argument("--images", type=int, default=4, help="images of each, at least 2")
    options, extra = parser.parse_known_args()
    if options.images < 2:
        parser.error(f"`--images` must be >= 2: diversity compares images of one prompt. Found {options.images}.")
    try:
        figures = {
            str(run): (sample(run, "none", options, extra), sample(run, options.adapter, options, extra))
            for run in options.runs
        }
    except ComparisonError as error:
        sys.exit(f"error: {error}")
    print(appearance_table(figures))


if __name__ == "__main__":
    main()
