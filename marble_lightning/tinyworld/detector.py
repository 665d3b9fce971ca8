"""The object detector for GenEval in the tiny world: blobs of one colour, recognised by their silhouette."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from marble_lightning.tinyworld.scenes import COLOURS, SHAPES, Thing, outline
from rewards.geneval.detectors import Detection, Detector

SIDE = 16
"""Side in pixels of the square to which silhouettes are stretched for comparison."""


class ColourBlobs(Detector):
    """Detect connected pixels of one palette colour, and compare their silhouette with the silhouette of each shape.

    A pixel belongs to the nearest palette colour within `reach`. The score of a blob for a shape rises from 0 to 1 with the
    overlap (intersection over union) of the silhouettes. It falls if width and height of the blob differ.

    Args:
        reach: Maximum distance of a pixel to a palette colour, in RGB units of 0 to 255.
        min_area: Minimum size of a blob in pixels.
    """

    classes = frozenset(SHAPES)
    colour_names = frozenset(COLOURS)
    identity_fields = (*Detector.identity_fields, "reach", "min_area")

    def __init__(self, reach: float = 62.0, min_area: int = 40) -> None:
        super().__init__()
        self.reach, self.min_area = reach, min_area

    def detect(self, images: Float[Tensor, "batch 3 height width"]) -> list[list[Detection]]:
        """Return all blobs of each image, each with its most likely shape."""
        pixels = (images.detach().float().cpu() * 255).permute(0, 2, 3, 1).numpy()
        palette = np.array(list(COLOURS.values()), dtype=np.float32)
        distance = np.linalg.norm(pixels[:, :, :, None] - palette, axis=-1)
        nearest = np.where(distance.min(-1) < self.reach, distance.argmin(-1), -1)
        return [self._blobs(image) for image in nearest]

    def _blobs(self, nearest: np.ndarray) -> list[Detection]:
        detections = []
        for index, colour in enumerate(COLOURS):
            labels, _ = ndimage.label(nearest == index)
            for number, place in enumerate(ndimage.find_objects(labels), start=1):
                blob = labels[place] == number
                if blob.sum() < self.min_area:
                    continue
                shape, score = recognise(blob)
                rows, columns = place
                mask = torch.from_numpy(labels == number)
                box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
                detections.append(Detection(shape, score, box, mask, colour))
        return detections


def recognise(blob: np.ndarray) -> tuple[str, float]:
    """Return the most likely shape of a silhouette (bool, cropped to its box) and a score from 0 to 1."""
    stretched = np.asarray(Image.fromarray(blob).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    overlaps = {shape: _overlap(stretched, silhouette) for shape, silhouette in _silhouettes().items()}
    shape = max(overlaps, key=lambda name: overlaps[name])
    height, width = blob.shape
    roundness = min(1.0, 1.4 * min(height, width) / max(height, width))
    return shape, float(np.clip((overlaps[shape] * roundness - 0.5) / 0.2, 0, 1))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@lru_cache
def _silhouettes() -> dict[str, np.ndarray]:
    """Return the silhouette of each shape, cropped to its box and stretched to the square."""
    silhouettes = {}
    for shape in SHAPES:
        canvas = Image.new("1", (8 * SIDE, 8 * SIDE))
        side = 8.0 * SIDE
        ImageDraw.Draw(canvas).polygon(outline(Thing(shape, "red", side / 2, side / 2, side, side)), fill=1)
        silhouettes[shape] = np.asarray(canvas.crop(canvas.getbbox()).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return silhouettes
