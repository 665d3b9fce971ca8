"""Image statistics of hand-made images, against values worked out by hand."""

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


PICTURES = {
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


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_made_by_hand(name):
    picture, expected = PICTURES[name]
    found = {statistic: float(function(picture)) for statistic, function in PER_IMAGE.items()}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", PER_IMAGE)
def test_a_picture_is_judged_by_itself(name):
    """(image, 3, height, width) -> (image,), each as if it were alone; the channels' order matters to luma only."""
    images = torch.rand(5, 3, 7, 9, generator=generator("pictures"))
    function = PER_IMAGE[name]
    together = function(images)
    assert together.shape == (5,)
    torch.testing.assert_close(together, torch.cat([function(image[None]) for image in images]))
    torch.testing.assert_close(together, function(images.transpose(2, 3)))


def test_a_line_is_seen_by_the_laplacian_of_its_inner_pixels():
    """A white column in black: 2 on it, 1 on either side."""
    picture = flat(0, 0, 0, side=7)
    picture[..., 3] = 1
    assert float(statistics.sharpness(picture)) == pytest.approx((2 + 1 + 1) / 5)


def test_clipping_counts_pixels_and_knows_the_8_bit_ends():
    eight_bit = torch.tensor([0, 1, 2, 253, 254, 255]).float() / 255
    picture = torch.full((1, 3, 1, 6), 0.5)
    picture[0, 1, 0] = eight_bit
    assert float(statistics.clipping(picture)) == pytest.approx(4 / 6)


def test_identical_pictures_have_no_diversity_and_the_distance_is_a_root_mean_square():
    images = torch.cat([flat(0.2, 0.4, 0.6)] * 3 + [flat(0, 0, 0), flat(1, 1, 1)] + [flat(0.5, 0, 0), flat(0, 0, 0)])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(diversity(images, groups), torch.tensor([0.0, 1.0, (0.5**2 / 3) ** 0.5]))


def test_diversity_is_the_mean_over_pairs_whatever_the_order():
    """Greys at 0, 0.3 and 0.9: distances 0.3, 0.6 and 0.9."""
    images = torch.cat([flat(0.3, 0.3, 0.3), flat(1, 1, 1), flat(0, 0, 0), flat(1, 1, 1), flat(0.9, 0.9, 0.9)])
    torch.testing.assert_close(diversity(images, torch.tensor([1, 0, 1, 0, 1])), torch.tensor([0.0, 0.6]))


def test_diversity_does_not_see_texture():
    """A checkerboard of single pixels and its negative are both grey at 16 x 16."""
    images = torch.cat([checkerboard(32), 1 - checkerboard(32)])
    torch.testing.assert_close(diversity(images, torch.tensor([0, 0])), torch.tensor([0.0]))


def test_one_table_of_all_by_prompt():
    images = torch.cat([flat(0, 0, 0), flat(1, 1, 1), checkerboard(), checkerboard()])
    expected = torch.tensor([[0.5, 0.0, 0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.0, 4.0, 1.0, 0.0]])
    torch.testing.assert_close(image_statistics(images, torch.tensor([0, 0, 1, 1])), expected)
    assert NAMES == ("brightness", "contrast", "saturation", "sharpness", "clipping", "diversity")


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="at least 3 x 3 pixels. Found 2 x 5"):
        statistics.sharpness(torch.rand(1, 3, 2, 5))
    with pytest.raises(ValueError, match="at least two images of each prompt. Found one with 1"):
        diversity(torch.rand(3, 3, 4, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="Found one with 0"):
        diversity(torch.rand(4, 3, 4, 4), torch.tensor([0, 0, 2, 2]))
