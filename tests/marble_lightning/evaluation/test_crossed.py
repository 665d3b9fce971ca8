"""Confidence intervals over seeds and prompts, both of which are samples."""

import pytest
import torch
from scipy import stats

from marble_lightning.evaluation.statistics import (
    crossed_error,
    crossed_interval,
    holm,
    interquartile_mean,
    probability_of_improvement,
    studentised_interval,
)


def sample(seed, seeds=5, prompts=60, sizes=(0.3, 1.0, 1.0)):
    """Changes of mean 0: an effect of each seed, one of each prompt, and noise."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((seeds, 1), (1, prompts), (seeds, prompts))
    return sum(size * torch.randn(*shape, generator=draw) for size, shape in zip(sizes, shapes, strict=True))


def test_the_error_of_one_kind_of_effect_is_the_usual_one():
    of_seeds = torch.tensor([0.1, 0.4, -0.2, 0.3])[:, None].expand(4, 50)
    assert float(crossed_error(of_seeds)) == pytest.approx(stats.sem(of_seeds[:, 0].numpy()))
    of_prompts = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(4, 50)
    assert float(crossed_error(of_prompts)) == pytest.approx(stats.sem(of_prompts[0].numpy()), rel=1e-4)


def test_many_prompts_and_no_effect_of_seeds_give_the_interval_of_student():
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(0)).expand(5, 400)
    interval = crossed_interval(values)
    low, high = stats.t.interval(0.95, 399, loc=float(values.mean()), scale=stats.sem(values[0].numpy()))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("sizes", [(0.3, 1.0, 1.0), (0.0, 1.0, 1.0), (0.3, 0.0, 1.0)])
def test_95_percent_intervals_of_five_seeds_cover_the_mean(sizes):
    intervals = [crossed_interval(sample(seed, sizes=sizes), resamples=500) for seed in range(200)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals) / len(intervals)
    assert 0.89 <= covered <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("sizes", [(1.0, 0.3, 0.3), (0.0, 1.0, 1.0)], ids=["seeds_dominate", "seeds_negligible"])
def test_95_percent_intervals_cover_a_known_difference(seeds, sizes):
    """In at least 93 % of 1000 simulations; 1000 resamples in place of 4000, which only makes the ends less certain."""
    intervals = [crossed_interval(0.25 + sample(trial, seeds, sizes=sizes), resamples=1000) for trial in range(1000)]
    covered = sum(interval.low <= 0.25 <= interval.high for interval in intervals) / 1000
    print(f"{seeds} seeds, effects {sizes}: {covered:.1%} of 1000 intervals cover")
    assert covered >= 0.93


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seeds", "least"), [(2, 0.8), (3, 0.94), (5, 0.975)])
@pytest.mark.parametrize("sizes", [(1.0, 0.3, 0.3), (0.0, 1.0, 1.0)], ids=["seeds_dominate", "seeds_negligible"])
def test_99_percent_intervals_of_few_seeds_cover_less(seeds, least, sizes):
    """1000 simulations; with few seeds the bootstrap has too few distinct draws for the tails."""
    intervals = [crossed_interval(0.25 + sample(trial, seeds, sizes=sizes), 0.99) for trial in range(1000)]
    covered = sum(interval.low <= 0.25 <= interval.high for interval in intervals) / 1000
    print(f"{seeds} seeds, effects {sizes}: {covered:.1%} of 1000 intervals cover")
    assert covered >= least


def test_scale_shift_and_order_do_not_matter():
    values = sample(0)
    one, other = crossed_interval(values), crossed_interval(2 * values + 1)
    assert other[:3] == pytest.approx([2 * end + 1 for end in one[:3]])
    assert crossed_interval(values.flip(1)) == pytest.approx(one, abs=0.03)


def test_prompts_without_a_score_are_left_out():
    values = sample(0)
    missing = torch.cat([values, torch.full((5, 3), torch.nan)], 1)
    missing[0, -1] = 1.0
    assert crossed_interval(missing) == crossed_interval(values)
    assert crossed_interval(torch.full((3, 4), 0.25)) == (0.25, 0.25, 0.25, 0)
    with pytest.raises(ValueError, match="at least 2 seeds and 2 prompts with a score. Found 1 and 60"):
        crossed_interval(values[:1])


def test_the_p_value_belongs_to_the_interval():
    """The interval of level 1 - p ends about at 0."""
    for seed in range(5):
        values = sample(seed) + 0.1
        p = crossed_interval(values).p_value
        interval = crossed_interval(values, level=1 - p)
        assert min(abs(interval.low), abs(interval.high)) < 0.02 * float(crossed_error(values))
    assert crossed_interval(torch.zeros(3, 4)).p_value == 1
    assert crossed_interval(torch.ones(3, 4)).p_value == 0
    alternating = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # no error of the mean, though draws have some
    assert crossed_interval(alternating) == (0, 0, 0, 1)


def test_the_p_value_of_skewed_draws_agrees_with_their_interval():
    """Draws with a long tail on one side: the interval excludes 0 at every level above 1 - p, and only there."""
    draws = torch.Generator().manual_seed(0)
    t = torch.empty(4000, dtype=torch.float64).exponential_(generator=draws) - 1  # skewed to the right
    mean, error = torch.tensor(-1.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    tested = (mean, error, mean + t, torch.ones(4000, dtype=torch.float64))
    p = studentised_interval(*tested, level=0.95).p_value
    assert p < 0.001  # no draw is as far on this side, though a tenth is as far on the other
    assert studentised_interval(*tested, level=0.99).high < 0
    opposite = (-mean, *tested[1:2], -mean + t, tested[3])
    p = studentised_interval(*opposite, level=0.95).p_value
    assert p == pytest.approx(2 * float((t >= 1.5).double().mean()), abs=0.001) and p > 0.05
    assert (
        studentised_interval(*opposite, level=1 - p - 0.01).low > 0 > studentised_interval(*opposite, level=1 - p + 0.01).low
    )


def test_p_values_of_nothing_are_uniform():
    p = torch.tensor([crossed_interval(sample(seed), resamples=500).p_value for seed in range(200)])
    for level in (0.05, 0.2, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=4 * (level * (1 - level) / 200) ** 0.5)


def test_improvement_is_the_mann_whitney_statistic():
    one, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 0.0, 3.5])
    expected = stats.mannwhitneyu(one.numpy(), other.numpy()).statistic / 12
    assert probability_of_improvement(one, other) == pytest.approx(expected)
    assert probability_of_improvement(one, one) == 0.5


def test_the_interquartile_mean_leaves_quarters_out():
    assert interquartile_mean(torch.tensor([100.0, 1.0, 2.0, -50.0])) == 1.5
    assert interquartile_mean(torch.tensor([3.0, 1.0, 2.0])) == 2


def test_holm_by_hand():
    """Sorted values times 4, 3, 2, 1, never falling, at most 1."""
    corrected = holm(torch.tensor([0.02, 0.9, 0.01, 0.3]))
    assert corrected.tolist() == pytest.approx([0.06, 0.9, 0.04, 0.6])
    assert holm(torch.tensor([0.4, 0.4])).tolist() == pytest.approx([0.8, 0.8])
    assert holm(torch.tensor([0.7, 0.6])).tolist() == [1, 1]
