"""Image statistics of synthetic images, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.evaluation import image_statistics as statistics
from marble_lightning.evaluation.image_statistics import NAMES, PER_IMAGE, diversity, image_statistics
from marble_lightning.utils.seeds import generator


def flat(*colour: float, side: int = 6) -> torch.Tensor:
    """One image of one colour."""
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side).clone()


def checkerboard(side: int = 6) -> torch.Tensor:
    """Black and white pixels in turn."""
    return ((torch.arange(side)[:, None] + torch.arange(side)) % 2).float().expand(1, 3, side, side).clone()


IMAGES = {
    "black": (flat(0, 0, 0), {"brightness": 0, "contrast": 0, "saturation": 0, "sharpness": 0, "clipping": 1}),
    "white": (flat(1, 1, 1), {"brightness": 1, "contrast": 0, "saturation": 0, "sharpness": 0, "clipping": 1}),
    "grey": (flat(0.5, 0.5, 0.5), {"brightness": 0.5, "contrast": 0, "saturation": 0, "sharpness": 0, "clipping": 0}),
    "red": (flat(1, 0, 0), {"brightness": 0.299, "contrast": 0, "saturation": 1, "sharpness": 0, "clipping": 1}),
    "dull green": (  # (0.6 - 0.3) / 0.6 saturated
        flat(0.3, 0.6, 0.3),
        {"brightness": 0.3 + 0.587 * 0.3, "contrast": 0, "saturation": 0.5, "sharpness": 0, "clipping": 0},
    ),
    "checkerboard": (  # every inner pixel is 1 away from its four neighbours
        checkerboard(),
        {"brightness": 0.5, "contrast": 0.5, "saturation": 0, "sharpness": 4, "clipping": 1},
    ),
    "soft checkerboard": (
        0.25 + 0.5 * checkerboard(),
        {"brightness": 0.5, "contrast": 0.25, "saturation": 0, "sharpness": 2, "clipping": 0},
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_synthetic_images(name):
    image, expected = IMAGES[name]
    values = {statistic: float(function(image)) for statistic, function in PER_IMAGE.items()}
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", PER_IMAGE)
def test_statistics_of_an_image_do_not_depend_on_the_batch(name):
    """(image, 3, height, width) -> (image,), the same as one by one, and unchanged by a transposition."""
    images = torch.rand(5, 3, 7, 9, generator=generator("images"))
    function = PER_IMAGE[name]
    together = function(images)
    assert together.shape == (5,)
    torch.testing.assert_close(together, torch.cat([function(image[None]) for image in images]))
    torch.testing.assert_close(together, function(images.transpose(2, 3)))


def test_sharpness_of_a_line():
    """A white column on black: the Laplacian is 2 on it and 1 on either side."""
    image = flat(0, 0, 0, side=7)
    image[..., 3] = 1
    assert float(statistics.sharpness(image)) == pytest.approx((2 + 1 + 1) / 5)


def test_clipping_counts_pixels_at_the_8_bit_ends():
    eight_bit = torch.tensor([0, 1, 2, 253, 254, 255]).float() / 255
    image = torch.full((1, 3, 1, 6), 0.5)
    image[0, 1, 0] = eight_bit
    assert float(statistics.clipping(image)) == pytest.approx(4 / 6)


def test_diversity_is_zero_for_equal_images_and_a_root_mean_square():
    images = torch.cat([flat(0.2, 0.4, 0.6)] * 3 + [flat(0, 0, 0), flat(1, 1, 1)] + [flat(0.5, 0, 0), flat(0, 0, 0)])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(diversity(images, groups), torch.tensor([0.0, 1.0, (0.5**2 / 3) ** 0.5]))


def test_diversity_is_the_mean_over_pairs_in_any_order():
    """Greys at 0, 0.3 and 0.9: distances 0.3, 0.6 and 0.9."""
    images = torch.cat([flat(0.3, 0.3, 0.3), flat(1, 1, 1), flat(0, 0, 0), flat(1, 1, 1), flat(0.9, 0.9, 0.9)])
    torch.testing.assert_close(diversity(images, torch.tensor([1, 0, 1, 0, 1])), torch.tensor([0.0, 0.6]))


def test_diversity_ignores_texture():
    """A checkerboard of single pixels and its negative are both grey at 16 x 16."""
    images = torch.cat([checkerboard(32), 1 - checkerboard(32)])
    torch.testing.assert_close(diversity(images, torch.tensor([0, 0])), torch.tensor([0.0]))


def test_all_statistics_by_prompt():
    images = torch.cat([flat(0, 0, 0), flat(1, 1, 1), checkerboard(), checkerboard()])
    expected = torch.tensor([[0.5, 0.0, 0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.0, 4.0, 1.0, 0.0]])
    torch.testing.assert_close(image_statistics(images, torch.tensor([0, 0, 1, 1])), expected)
    assert NAMES == ("brightness", "contrast", "saturation", "sharpness", "clipping", "diversity")


def test_too_few_pixels_or_images_are_refused():
    with pytest.raises(ValueError, match="at least 3 x 3 pixels. Found 2 x 5"):
        statistics.sharpness(torch.rand(1, 3, 2, 5))
    with pytest.raises(ValueError, match="at least two images of each prompt. Found one with 1"):
        diversity(torch.rand(3, 3, 4, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="Found one with 0"):
        diversity(torch.rand(4, 3, 4, 4), torch.tensor([0, 0, 2, 2]))
