"""Preprocessing compared with transformers' processor, and detections compared with a direct computation."""

import numpy as np
import pytest
import torch
from transformers import Mask2FormerImageProcessorPil

from rewards.geneval.coco import COCO_CLASSES
from rewards.geneval.instances import DetectorPreprocess, find_instances
from tests.helpers.mask2former_reference import PREPROCESSOR, QUERIES, assert_same, by_hand


@pytest.mark.parametrize("size", [(64, 64), (80, 60), (60, 80), (40, 200), (300, 90), (97, 61), (128, 224), (33, 33)])
def test_preprocessing_agrees_with_transformers(size: tuple[int, int]) -> None:
    processor = Mask2FormerImageProcessorPil.from_dict(PREPROCESSOR)
    pixels = torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(sum(size)), dtype=torch.uint8)
    expected = processor(pixels.numpy(), size={"shortest_edge": 64, "longest_edge": 112}, return_tensors="pt").pixel_values
    actual = DetectorPreprocess.from_config(PREPROCESSOR, 64, 112)(pixels[None] / 255)
    assert actual.shape == expected.shape
    # The library's resampling rounds to 8 bits after each of its two passes.
    levels = (actual - expected).abs() * torch.tensor(PREPROCESSOR["image_std"]).view(3, 1, 1) * 255
    assert levels.max() < 1.05 and levels.mean() < 0.4
    if min(size) == 64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # no resampling


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1024), (1344, 704), (720, 1280), (500, 333), (2000, 300)])
@pytest.mark.parametrize("divisor", [32, 1])
def test_default_sizes_agree_with_transformers(size: tuple[int, int], divisor: int) -> None:
    limits = {"shortest_edge": 800, "longest_edge": 1333}
    processor = Mask2FormerImageProcessorPil.from_dict({**PREPROCESSOR, "size": limits, "size_divisor": divisor})
    expected = processor(np.zeros((3, *size), np.uint8), return_tensors="pt").pixel_values.shape[-2:]
    actual = DetectorPreprocess.from_config({**PREPROCESSOR, "size_divisor": divisor}, 800, 1333).shape(*size)
    assert actual == tuple(expected)


@pytest.mark.parametrize("floor", [0.3, 0.0])
def test_instances_of_blobs(floor: float) -> None:
    """Artificial raw outputs: round masks of many sizes and positions, one of them empty."""
    generator = torch.Generator().manual_seed(5)
    classes = 4 * torch.randn(QUERIES, 81, generator=generator)
    classes[3, 7:9] = 15  # a query with two equally probable classes: both are returned
    rows, columns = torch.arange(20.0)[:, None], torch.arange(30.0)
    y, x, radius = (torch.rand(3, QUERIES, 1, 1, generator=generator) * torch.tensor([20, 30, 9]).view(3, 1, 1, 1)).unbind()
    logits = radius + 0.5 - ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
    logits[2] = -1
    expected = by_hand(classes.double().numpy(), logits.double().numpy(), floor, ((80, 120), (50, 70)))
    detections = find_instances(classes, logits, COCO_CLASSES, input_size=(80, 120), image_size=(50, 70), min_score=floor)
    assert_same(detections, expected)
    assert len({d.box for d in detections}) > 4 and not any(d.box == (0, 0, 70, 50) for d in detections)
    assert {"truck", "boat"} <= {d.label for d in detections if d.score > 0.3}
    if not floor:
        assert len(detections) == (QUERIES - 1) * 80
