"""Figures of images of known colours."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.appearance import (
    CATEGORIES,
    PALETTE,
    appearance,
    appearance_table,
    is_flat,
    nearest_colours,
    sample,
)
from benchmarks.fits import ComparisonError
from marble_lightning.tinyworld.scenes import BACKGROUNDS, PAINTS


def plain(*colour):
    """An image of one colour."""
    return (torch.tensor(colour) / 255)[:, None, None].expand(3, 32, 32).clone()


def test_pixels_have_the_colours_of_the_palette():
    backgrounds = [colour for ends in BACKGROUNDS.values() for colour in ends]
    found = nearest_colours(torch.stack([plain(*colour) for colour in [*PALETTE.values(), *backgrounds]]))
    assert found[:, 0, 0].tolist() == [*range(len(PALETTE)), *[len(PALETTE)] * len(backgrounds)]
    assert (found == found[:, :1, :1]).all()


def test_an_image_of_one_colour_is_flat():
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.stack([plain(214, 38, 38), plain(214, 38, 38) + 0.02 * noise, noise])
    assert is_flat(images).tolist() == [True, True, False]


def test_figures_of_known_images():
    red, black = plain(*PAINTS["red"]), plain(*PAINTS["black"])
    half = red.clone()
    half[:, :16] = black[:, :16]
    prompts = ["a circle", "a circle", "a red circle", "a red circle"]
    figures = appearance(torch.stack([half, black, red, red]), prompts, 2)
    assert figures["black pixels"].tolist() == pytest.approx([0.75, 0])
    assert figures["flat images"].tolist() == [0.5, 1]
    assert figures["no colour named: black"].tolist() == pytest.approx([0.75])
    assert figures["no colour named: red"].tolist() == pytest.approx([0.25])
    assert sum(figures[f"no colour named: {name}"] for name in CATEGORIES) == pytest.approx(1)
    assert figures["brightness"].shape == (2,)
    assert {"brightness", "diversity"} < figures.keys()
    with pytest.raises(ComparisonError, match="Some prompts must name no colour"):
        appearance(torch.stack([red, red]), ["a red circle"] * 2, 2)


def test_factors_beyond_the_range_are_marked():
    base = {"a": torch.tensor([0.3, 0.5]), "b": torch.zeros(2)}
    trained = {"a": torch.tensor([0.3, 0.7]), "b": torch.tensor([0.1, 0.1])}
    text = appearance_table({"one": (base, trained), "two": (base, base)})
    assert "| a | 0.400 | 0.500 (x 1.25, +0.100 ± 0.100) | 0.400 (x 1.00, +0.000 ± 0.000) |" in text
    assert "| b | 0.000 | **0.100 (x inf, +0.100 ± 0.000)** | 0.000 (x 1.00, +0.000 ± 0.000) |" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ComparisonError, match="RUN must be a folder of `fit`"):
        sample(tmp_path, "ema", argparse.Namespace(prompts=1, images=2), [])
