"""Normalised gains, and the interval of the difference of two least gains."""

import pytest
import torch

from marble_lightning.evaluation.gains import (
    least_gain_difference,
    mean_gain_difference,
    normalised_gains,
)
from marble_lightning.evaluation.statistics import crossed_interval


def test_normalised_gains_are_shares_of_the_specialists():
    prompts = torch.tensor([1.0, 2.0, 3.0])
    changes = torch.stack([prompts / 2, -prompts, prompts], -1)[None].repeat(2, 1, 1)
    changes[:, 2, 0] = torch.nan  # the reward does not apply to this prompt
    specialists = torch.stack([prompts, prompts, torch.tensor([-4.0, 0.0, 5.0])], -1)[None].repeat(3, 1, 1)
    specialists[:, 2, 0] = torch.nan
    gains = normalised_gains(changes, specialists)
    torch.testing.assert_close(gains, torch.tensor([0.5, -1.0, torch.nan], dtype=torch.float64), equal_nan=True)
    assert normalised_gains(changes, specialists[:1]).isfinite().tolist() == [True, True, False]  # errors over prompts


def draw_changes(generator, means, seeds=5, prompts=60, applies=60, sizes=(0.1, 0.3, 0.3)):
    """Changes with effects of seeds and prompts, and noise, by reward; the last reward applies to the first prompts only."""
    effects = list(zip(sizes, ((seeds, 1, 1), (1, prompts, 1), (seeds, prompts, 1)), strict=True))
    columns = [mean + sum(size * torch.randn(shape, generator=generator) for size, shape in effects) for mean in means]
    found = torch.cat(columns, 2)
    found[:, applies:, -1] = torch.nan
    return found


def test_one_reward_and_certain_specialists_give_the_crossed_interval():
    generator = torch.Generator().manual_seed(0)
    one, other = (draw_changes(generator, [mean]) for mean in (0.6, 0.5))
    specialists = torch.full((3, 60, 1), 2.0)
    interval = least_gain_difference(one, other, specialists)
    expected = crossed_interval((one - other)[..., 0] / 2, level=0.99)
    assert interval == pytest.approx(expected, abs=0.02)
    assert mean_gain_difference(one, other, specialists) == interval  # of one reward


def test_the_mean_gain_has_the_interval_of_the_mean_over_rewards():
    generator = torch.Generator().manual_seed(0)
    one, other = (draw_changes(generator, means) for means in ([0.6, 0.2, 1.0], [0.5, 0.4, 0.7]))
    specialists = torch.tensor([2.0, 1.0, 4.0]).expand(3, 60, 3)
    interval = mean_gain_difference(one, other, specialists)
    expected = crossed_interval(((one - other) / specialists[0, 0]).mean(2), level=0.99)
    assert interval == pytest.approx(expected, abs=0.02)
    swapped = mean_gain_difference(other, one, specialists)
    assert swapped == pytest.approx((-interval.mean, -interval.high, -interval.low, interval.p_value), abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("sizes", [(0.2, 0.05, 0.1), (0.0, 0.3, 0.3)], ids=["seeds_dominate", "seeds_negligible"])
@pytest.mark.parametrize(
    ("means", "of_other", "expected"), [([0.5, 1.0], [0.9, 0.3], 0.93), ([0.5, 0.5], [0.3, 0.3], 0.9)], ids=["apart", "tied"]
)
def test_the_interval_covers_the_true_difference(means, of_other, expected, sizes, seeds):
    """Two rewards, one of which applies to a third of the prompts, in 1000 simulations.

    At a tie the least gain has a kink, where no bootstrap is exact; intervals cover a little less. 500 resamples in place of
    4000, which only makes the ends less certain.
    """
    covered, more = 0, {"seeds": seeds, "applies": 20, "sizes": sizes}
    for trial in range(1000):
        generator = torch.Generator().manual_seed(trial)
        one, other = (draw_changes(generator, gains, **more) for gains in (means, of_other))
        specialists = draw_changes(generator, [1.0, 1.0], **more)
        interval = least_gain_difference(one, other, specialists, level=0.95, resamples=500)
        covered += interval.low <= 0.2 <= interval.high
    print(f"{seeds} seeds, effects {sizes}, gains {means}: {covered / 10:.1f} % of 1000 intervals cover")
    assert covered / 1000 >= expected


def test_an_interval_needs_seeds_and_specialists():
    changes = draw_changes(torch.Generator().manual_seed(0), [1.0, 1.0])
    with pytest.raises(ValueError, match="at least 2 seeds"):
        least_gain_difference(changes[:1], changes[:1], changes)
    with pytest.raises(ValueError, match="the same seeds, prompts and rewards"):
        least_gain_difference(changes, changes[:4], changes)
    with pytest.raises(ValueError, match="at least 3 standard errors"):
        least_gain_difference(changes, changes, changes - 1)
