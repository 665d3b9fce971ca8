"""How very long images, such as flat boxes of objects, are resized and cropped."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from rewards.clip.tower import Preprocess


def whole_resized(images: torch.Tensor, pre: Preprocess) -> torch.Tensor:
    """Resize whole images and keep the centre, without normalising."""
    height, width = images.shape[-2:]
    shape = [pre.size * side // min(height, width) for side in (height, width)]
    if shape != [height, width]:
        images = torch.nn.functional.interpolate(images, size=shape, mode=pre.resize, antialias=True).clamp(0, 1)
    top, left = ((side - pre.crop) // 2 for side in shape)
    return images[..., top : top + pre.crop, left : left + pre.crop]


def sizes(least: int, most: int) -> Iterator[tuple[int, int]]:
    """Twenty random sizes with a ratio of the sides in a range."""
    source = random.Random(least)
    for index in range(20):
        short = source.randint(1, 40)
        yield (short, source.randint(least * short, most * short))[:: 1 if index % 2 else -1]


def test_ordinary_images_are_resized_whole() -> None:
    for size in sizes(1, 8):
        image, pre = torch.rand(1, 3, *size), Preprocess(36, 32, (0, 0, 0), (1, 1, 1))
        assert torch.equal(pre(image), whole_resized(image, pre)), size


@pytest.mark.parametrize("centre", ["floor", "even"])
def test_the_ends_of_long_images_are_not_resized(centre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift of a pixel changes a slope of 1 per pixel of the result by 1."""
    pre, resized = Preprocess(36, 32, (0, 0, 0), (1, 1, 1), centre=centre), list[int]()
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "rewards.clip.tower.F.interpolate",
        lambda images, size, **options: resized.append(max(size)) or interpolate(images, size=size, **options),
    )
    for height, width in sizes(9, 40):
        short, long = min(height, width), max(height, width)
        slope = torch.linspace(0, 1, long).expand(1, 3, short, long)
        image = slope if width > height else slope.mT
        actual = pre(image)
        assert resized.pop() <= 9 * 36
        step = short / 36 / (long - 1)
        torch.testing.assert_close(actual, whole_resized(image, pre), rtol=0, atol=1.2 * step)


def test_the_middle_of_a_line_is_exact() -> None:
    """One row of pixels, as a very flat box has."""
    image, pre = torch.rand(1, 3, 1, 512), Preprocess(224, 224, (0, 0, 0), (1, 1, 1), centre="even")
    torch.testing.assert_close(pre(image), whole_resized(image, pre), rtol=0, atol=1e-4)
