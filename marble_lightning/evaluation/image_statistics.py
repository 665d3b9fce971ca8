"""What images look like in six numbers, whatever the rewards say: pure functions of images in [0, 1]."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601."""
THUMBNAIL = 16
"""Side, in pixels, of the images that `diversity` compares: composition and colour, not texture."""


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
    """Mean over the pixels of HSV's saturation (max - min) / max of the channels, 0 for black; in [0, 1]."""
    low, high = images.float().aminmax(dim=1)
    return torch.where(high > 0, (high - low) / high, 0.0).mean((1, 2))


def sharpness(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Mean over the inner pixels of |4 y - y_left - y_right - y_above - y_below| of luma y, in [0, 4].

    Raises:
        ValueError: Images without an inner pixel.
    """
    y = luma(images)
    if min(y.shape[1:]) < 3:
        raise ValueError(f"`images` must be at least 3 x 3 pixels. Found {y.shape[1]} x {y.shape[2]}; nothing is inside.")
    neighbours = y[:, 1:-1, :-2] + y[:, 1:-1, 2:] + y[:, :-2, 1:-1] + y[:, 2:, 1:-1]
    return (4 * y[:, 1:-1, 1:-1] - neighbours).abs().mean((1, 2))


def clipping(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, " image"]:
    """Share of pixels with any channel at an end of the 8-bit scale, <= 1/255 or >= 254/255; in [0, 1]."""
    images = images.float()
    ended = (images <= 1 / 255) | (images >= 254 / 255)
    return ended.any(1).float().mean((1, 2))


def diversity(images: Float[Tensor, "image 3 height width"], groups: Int[Tensor, " image"]) -> Float[Tensor, " group"]:
    """How different the images of one prompt are: the mean over their pairs of a distance in [0, 1].

    The distance is the root mean square difference of pixels, of images averaged down to 16 x 16.

    Args:
        images: Images in [0, 1].
        groups: Index of each image's prompt, 0 to the number of prompts - 1, none left out.

    Raises:
        ValueError: A prompt with fewer than two images.
    """
    if len(groups) and int(fewest := groups.bincount().min()) < 2:
        raise ValueError(f"`groups` must have at least two images of each prompt. Found one with {int(fewest)}.")
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)
    apart = [torch.nn.functional.pdist(small[groups == group]).mean() for group in range(int(groups.max()) + 1)]
    return torch.stack(apart) / small.shape[1] ** 0.5


PER_IMAGE = {each.__name__: each for each in (brightness, contrast, saturation, sharpness, clipping)}
NAMES = (*PER_IMAGE, "diversity")
"""The columns of `image_statistics`."""


def image_statistics(
    images: Float[Tensor, "image 3 height width"], groups: Int[Tensor, " image"]
) -> Float[Tensor, "group statistic"]:
    """Every statistic of every prompt, those of single images as means over the prompt's; columns as in `NAMES`."""
    single = torch.stack([statistic(images) for statistic in PER_IMAGE.values()], dim=1)
    means = torch.stack([single[groups == group].mean(0) for group in range(int(groups.max()) + 1)])
    return torch.cat([means, diversity(images, groups)[:, None]], dim=1)
