"""Preprocessing for an instance segmentation model, and conversion of its raw outputs to detections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rewards.geneval.detectors import Detection

BILINEAR = 2
"""PIL's number for bilinear resampling, as preprocessor_config.json spells it."""


@dataclass(frozen=True)
class DetectorPreprocess:
    """Resize bilinearly to a given shorter side, with a limit for the longer side, and normalise.

    Both sides are then stretched to the next multiple of `divisor`, as in transformers' processor.

    Args:
        short_side: Pixels of the shorter side.
        long_side: Maximum pixels of the longer side; the shorter side shrinks in proportion.
        divisor: Both sides of the result are multiples of it.
        scale: Factor applied to pixels in [0, 1] before normalising.
        mean: Mean per channel, which is subtracted.
        std: Standard deviation per channel, the divisor.

    Shape:
        - images: (B, 3, H, W), result: (B, 3, H', W')
    """

    short_side: int
    long_side: int
    divisor: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        shape = self.shape(images.shape[-2], images.shape[-1])
        if shape != images.shape[-2:]:
            images = F.interpolate(images, size=shape, mode="bilinear", antialias=True)  # antialias: PIL's kernel
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images * self.scale - mean) / std

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the resized image.

        >>> DetectorPreprocess(800, 1333, 32, 1.0, (0, 0, 0), (1, 1, 1)).shape(512, 512)
        (800, 800)
        """
        short, long = min(height, width), max(height, width)
        exact = min(self.short_side, self.long_side * short / long)
        new_short = round(exact)
        # Same order of operations as in transformers, because `int` truncates the result.
        new_long = long if short == new_short else int(exact * long / short)
        new_short, new_long = (math.ceil(side / self.divisor) * self.divisor for side in (new_short, new_long))
        return (new_short, new_long) if height <= width else (new_long, new_short)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], short_side: int, long_side: int) -> "DetectorPreprocess":
        """Read a preprocessor_config.json, except its `size`, which can differ from the benchmark's.

        Raises:
            ValueError: if the file specifies another resampling or has no normalisation.
        """
        steps = all(config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
        normalised = len(config.get("image_mean") or ()) == len(config.get("image_std") or ()) == 3
        if not steps or not normalised or config.get("resample", BILINEAR) != BILINEAR:
            raise ValueError(
                "preprocessor_config.json must resize bilinearly (`resample` 2), rescale, and normalise by an `image_mean` "
                f"and `image_std` of three numbers. Found {dict(config)}. Use the file of a Mask2Former model."
            )
        return cls(
            short_side=short_side,
            long_side=long_side,
            divisor=config.get("size_divisor", 32) or 1,
            scale=255 * config.get("rescale_factor", 1 / 255),
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
        )


def find_instances(
    class_logits: Float[Tensor, "query class_or_none"],
    mask_logits: Float[Tensor, "query h w"],
    names: Sequence[str],
    *,
    input_size: tuple[int, int],
    image_size: tuple[int, int],
    min_score: float,
) -> list[Detection]:
    """Return every (query, class) pair of one image with a score above `min_score`.

    score = p(class) * mean of sigmoid(mask logit) over the mask. The mask consists of the pixels with a positive logit.
    Logits are enlarged bilinearly to the size of the network's input and then to the size of the image, as in GenEval's
    published code.

    Args:
        class_logits: Class logits per query; the last one means "no object".
        mask_logits: Mask logits at the network's output resolution.
        names: Names of the classes.
        input_size: Height and width of the network's input.
        image_size: Height and width of the image; masks and boxes are in its pixels.
        min_score: Lower bound of returned scores (exclusive), in [0, 1).

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", 2022, appendix on instance
    inference, without the paper's limit of 100 pairs.
    """
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
    # A mask's mean is at most 1, so no other query can exceed `min_score` and its mask need not be enlarged.
    queries = (probabilities > min_score).any(dim=1).nonzero().squeeze(1)
    if not len(queries):
        return []
    logits = mask_logits[queries, None].float()
    for size in (input_size, image_size):
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    logits = logits.squeeze(1)
    masks = logits > 0
    # 1e-6 as published; it also makes the score of an empty mask 0.
    mask_scores = (logits.sigmoid() * masks).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) + 1e-6)
    scores = probabilities[queries] * mask_scores[:, None]
    values, boxes = scores.tolist(), mask_boxes(masks)
    return [
        Detection(names[index], values[query][index], boxes[query], masks[query])
        for query, index in (scores > min_score).nonzero().tolist()
    ]


def mask_boxes(masks: Bool[Tensor, "n h w"]) -> list[tuple[float, float, float, float]]:
    """Return the bounding box (x0, y0, x1, y1) of each non-empty mask; x1 and y1 are exclusive.

    >>> import torch
    >>> mask_boxes(torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0]]]).bool())
    [(1, 1, 3, 2)]
    """
    corners = []
    for axis in (1, 2):  # columns, then rows
        occupied = masks.any(dim=axis).int()
        corners.append((occupied.argmax(dim=1), occupied.shape[1] - occupied.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = corners
    return list(zip(x0.tolist(), y0.tolist(), x1.tolist(), y1.tolist(), strict=True))
