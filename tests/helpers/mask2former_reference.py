"""A small Mask2Former in the published format, and a second implementation of its post-processing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from rewards import Detection
from rewards.geneval.coco import COCO_CLASSES, OTHER_NAMES

QUERIES = 10
PUBLISHED_NAMES = [{new: old for old, new in OTHER_NAMES.items()}.get(name, name) for name in COCO_CLASSES]
"""Names of the published config.json: "sofa", "mouse", ..."""

PREPROCESSOR = {
    "_max_size": 1333,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 80,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}


def write_mask2former(folder: Path, names: list[str] = PUBLISHED_NAMES) -> Path:
    """A random Mask2FormerForUniversalSegmentation: config, weights under their published names, preprocessor."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=QUERIES,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        # With the initial weights all queries would have the same uncertain class; these give one or two certain classes.
        model.class_predictor.weight.data.mul_(25)
        model.class_predictor.bias.data[COCO_CLASSES.index("dog")] += 4
        model.model.transformer_module.queries_features.weight.data.mul_(3)
        for layer in model.model.transformer_module.decoder.mask_predictor.mask_embedder.parameters():
            layer.data.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation with half-pixel centres, by scipy."""
    rows, columns = (
        (np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip((height, width), values.shape, strict=True)
    )
    return map_coordinates(values, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")


def by_hand(classes: np.ndarray, logits: np.ndarray, floor: float, steps: tuple = ((64, 96), (48, 72))) -> list[Detection]:
    """Detections of one image, query by query in numpy. The last of `steps` is the size of the image."""
    detections = []
    for shares, mask_logits in zip(np.exp(classes), logits, strict=True):
        shares = shares / shares.sum()  # 80 classes and "no object"
        for size in steps:
            mask_logits = enlarge(mask_logits, *size)
        mask = mask_logits > 0
        if not mask.any():
            continue
        certainty = (1 / (1 + np.exp(-mask_logits[mask]))).mean()
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        for share, name in zip(shares, COCO_CLASSES, strict=False):
            if share * certainty > floor:
                detections.append(Detection(name, share * certainty, box, mask))
    return detections


def assert_same(actual: list[Detection], expected: list[Detection]) -> None:
    assert [d.label for d in actual] == [d.label for d in expected]  # every pair above the floor, and no other
    for one, other in zip(actual, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.box == other.box
        assert one.mask.dtype == torch.bool and np.array_equal(one.mask.numpy(), other.mask)
