"""Six statistics of images, independent of the rewards: pure functions of images in [0, 1]."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601."""
THUMBNAIL = 16
"""Side, in pixels, of the thumbnails that `diversity` compares; they keep composition and colour, but not texture."""


def luma(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image height width"]:
    """Perceived brightness of each pixel, in [0, 1]."""
    red, green, blue = images.float().unbind(1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def brightness(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Mean luma, in [0, 1].

    >>> brightness(torch.ones(1, 3, 4, 4))
    tensor([1.])
    """
    return luma(images).mean((1, 2))


def contrast(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Standard deviation of luma over the pixels, in [0, 0.5]."""
    return luma(images).std((1, 2), correction=0)


def saturation(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Mean HSV saturation over the pixels, (max - min) / max of the channels, 0 for black; in [0, 1]."""
    low, high = images.float().aminmax(dim=1)
    return torch.where(high > 0, (high - low) / high, 0.0).mean((1, 2))


def sharpness(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Mean of |4 y - y_left - y_right - y_above - y_below| over the inner pixels, where y is luma; in [0, 4].

    Raises:
        ValueError: The images have no inner pixel.
    """
    y = luma(images)
    if min(y.shape[1:]) < 3:
        raise ValueError(f"`images` must be at least 3 x 3 pixels. Found {y.shape[1]} x {y.shape[2]}; nothing is inside.")
    neighbours = y[:, 1:-1, :-2] + y[:, 1:-1, 2:] + y[:, :-2, 1:-1] + y[:, 2:, 1:-1]
    return (4 * y[:, 1:-1, 1:-1] - neighbours).abs().mean((1, 2))


def clipping(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Share of pixels with any channel at an end of the 8-bit scale, <= 1/255 or >= 254/255; in [0, 1]."""
    images = images.float()
    clipped = (images <= 1 / 255) | (images >= 254 / 255)
    return clipped.any(1).float().mean((1, 2))


def diversity(images: Float[Tensor, "image 3 height width"], groups: Int[Tensor, " image"]) -> Float[Tensor, " group"]:
    """Diversity of the images of one prompt: the mean distance over their pairs, in [0, 1].

    The distance is the root mean square difference between the pixels of two thumbnails, averaged down to 16 x 16.

    Args:
        images: Images in [0, 1].
        groups: Index of each image's prompt, from 0 to the number of prompts - 1 without gaps.

    Raises:
        ValueError: A prompt has fewer than two images.
    """
    if len(groups) and int(fewest := groups.bincount().min()) < 2:
        raise ValueError(f"`groups` must have at least two images of each prompt. Found one with {int(fewest)}.")
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)
    distances = [torch.nn.functional.pdist(small[groups == group]).mean() for group in range(int(groups.max()) + 1)]
    return torch.stack(distances) / small.shape[1] ** 0.5


PER_IMAGE = {statistic.__name__: statistic for statistic in (brightness, contrast, saturation, sharpness, clipping)}
NAMES = (*PER_IMAGE, "diversity")
"""The columns of `image_statistics`."""


def image_statistics(
    images: Float[Tensor, "image 3 height width"], groups: Int[Tensor, " image"]
) -> Float[Tensor, "group statistic"]:
    """All statistics of each prompt; statistics of single images are means over the prompt's images.

    Args:
        images: Images in [0, 1].
        groups: As in `diversity`.

    Returns:
        (group, statistic), with columns as in `NAMES`.
    """
    single = torch.stack([statistic(images) for statistic in PER_IMAGE.values()], dim=1)
    means = torch.stack([single[groups == group].mean(0) for group in range(int(groups.max()) + 1)])
    return torch.cat([means, diversity(images, groups)[:, None]], dim=1)
