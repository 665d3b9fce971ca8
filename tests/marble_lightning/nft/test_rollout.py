"""Loss coefficients from scores, and micro-batches."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from balancers import FixedWeights, Sequential, WeightedSum
from marble_lightning.nft.loss import Coefficients, Objective
from marble_lightning.nft.rollout import Plan, Rollout, compute_coefficients, image_order, micro_batches
from marble_lightning.policies.base import Conditions
from marble_lightning.scoring.failures import RewardError
from marble_lightning.scoring.settings import Scoring

KEY = (0, 1, 0, "train")


class Ranks:
    """Fake strategy of one rank of several, with given scores of all ranks."""

    def __init__(self, rank: int, all_scores: list[torch.Tensor]) -> None:
        self.rank, self.all_scores = rank, all_scores

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return torch.stack(self.all_scores)
        size = int(tensor.max()) - int(tensor.min()) + 1
        return torch.stack([tensor + (other - self.rank) * size for other in range(len(self.all_scores))])

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "mean"
        return tensor  # the same count on every rank in these tests


def coefficients_of(
    scores: torch.Tensor, groups: torch.Tensor, balancer, plan: Plan, rank: int = 0, all_scores=None, **objective
) -> Coefficients:
    balancer.bind([f"reward{k}" for k in range(scores.shape[1])])
    trainer = SimpleNamespace(strategy=Ranks(rank, all_scores or [scores]), global_rank=rank)
    (coefficients,) = compute_coefficients(scores, groups, balancer, Objective(beta=1.0, **objective), plan, [KEY], trainer)
    return coefficients


@pytest.mark.parametrize("level", ["merge_rewards", "merge_advantages"])
def test_merged_rewards_and_advantages_must_be_finite(level, caplog):
    """An infinite value that a method returns is left out and counts as a failure; so does a column of NaN."""
    scores, groups = torch.arange(8.0)[:, None].repeat(1, 2), torch.arange(2).repeat_interleave(4)
    plan = Plan(images=8, times=1, batch_size=8, optimizer_steps=1)

    def returning(value, rows):
        def merge(self, values, *_):
            return values.index_put((torch.arange(rows), torch.tensor(1)), torch.tensor(value))

        return type("Returning", (FixedWeights,), {level: merge})()

    def compute(balancer, **scoring):
        balancer.bind(["a", "b"])
        trainer = SimpleNamespace(strategy=Ranks(0, [scores]), global_rank=0)
        settings = Objective(beta=1.0), plan, [KEY], trainer, Scoring(**scoring)
        return compute_coefficients(scores, groups, balancer, *settings)[0]

    with pytest.raises(RewardError, match="Found 1 of 8 of `b` that are not.* allows a share of 0.0"):
        compute(returning(torch.inf, 1))
    with pytest.raises(RewardError, match="Found 2 of 8 of `b`.* allows a share of 0.2"):
        compute(returning(-torch.inf, 2), on_error="skip", max_skipped=0.2)
    with pytest.raises(RewardError, match="Found 8 of 8 of `b`"):
        compute(returning(torch.nan, 8), on_error="skip", max_skipped=0.5)
    caplog.clear()
    plus, minus = compute(returning(torch.inf, 1), on_error="skip", max_skipped=0.2)
    assert plus.isfinite().all() and (plus + minus)[0, 1] == 0 and ((plus + minus)[1:, 1] > 0).all()
    assert "Found 1 of 8 of `b`" in caplog.text


def test_a_single_column_must_not_be_lost(caplog):
    """It has a value for every image that any reward applies to."""

    class Lost(WeightedSum):
        def merge_rewards(self, rewards, applies):
            return torch.full_like(rewards[:, :1], torch.nan)

    scores = torch.tensor([[1.0, torch.nan], [torch.nan, 2.0], [torch.nan, torch.nan], [3.0, 4.0]])
    with pytest.raises(RewardError, match="Found 3 of 3 of `sum`"):
        coefficients_of(scores, torch.tensor([0, 0, 1, 1]), Lost(), Plan(4, 1, 2, 1))


def test_a_stage_without_images_has_no_coefficients(caplog):
    """Sequential's column is then NaN although the other reward applies."""
    scores, groups, plan = torch.rand(4, 2), torch.tensor([0, 0, 1, 1]), Plan(4, 1, 2, 1)
    scores[:, 0] = torch.nan
    plus, minus = coefficients_of(scores, groups, Sequential(rounds=1), plan)
    assert plus.tolist() == minus.tolist() == [[0.0]] * 4 and not caplog.text
    plus, minus = coefficients_of(scores, groups, Sequential(rounds=1, order=["reward1"]), plan)
    assert ((plus + minus) > 0).all()


def test_each_image_is_used_once_at_distinct_times():
    plan = Plan(images=12, times=3, batch_size=2, optimizer_steps=2)
    latents = torch.arange(12.0).view(12, 1, 1, 1)
    coefficients = Coefficients(torch.arange(12.0)[:, None], -torch.arange(12.0)[:, None])
    conditions = Conditions(torch.arange(3.0).view(3, 1, 1), torch.zeros(3, 1))
    rollout = Rollout(conditions, torch.arange(3).repeat_interleave(4), latents, torch.arange(12) < 4)
    grid = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    batches = list(micro_batches(rollout, coefficients, grid, plan, KEY))
    assert len(batches) == plan.total == 2 * plan.per_step == 18
    for start in range(0, 18, 3):  # all images of a step, then all again at another time
        assert len(torch.cat([batch.clean for batch in batches[start : start + 3]]).unique()) == 6
    uses: Counter[tuple[int, float]] = Counter()
    for batch in batches:
        images = batch.clean.flatten()
        torch.testing.assert_close(batch.coefficients.plus[:, 0], images)
        torch.testing.assert_close(batch.conditions.embeds.flatten(), images // 4)
        assert torch.equal(batch.in_first, images < 4)
        uses.update(zip(images.int().tolist(), batch.t.tolist(), strict=True))
    assert set(uses.values()) == {1}
    assert all(count == 3 for count in Counter(image for image, _ in uses).values())
    noise = torch.cat([batch.noise.flatten() for batch in batches])
    assert len(noise.unique()) == len(noise)


def test_the_same_key_gives_the_same_micro_batches():
    plan = Plan(images=4, times=2, batch_size=2, optimizer_steps=1)
    rollout = Rollout(
        Conditions(torch.zeros(1, 1, 1), torch.zeros(1, 1)),
        torch.zeros(4).long(),
        torch.randn(4, 1, 2, 2),
        torch.ones(4, dtype=torch.bool),
    )
    coefficients = Coefficients(torch.zeros(4, 1), torch.zeros(4, 1))
    grid = torch.linspace(1, 0.1, 6)
    one, other = (list(micro_batches(rollout, coefficients, grid, plan, KEY)) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.t, b.t)


def test_coefficients_add_up_over_each_optimizer_step():
    """n counts the samples of the step, so the weight of a reward does not depend on the number it applies to."""
    scores = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    scores[::3, 1] = torch.nan
    plan = Plan(images=12, times=2, batch_size=3, optimizer_steps=2)
    coefficients = coefficients_of(scores, torch.arange(4).repeat_interleave(3), FixedWeights(), plan)
    for step in image_order(plan, KEY).chunk(2):
        total = plan.times * (coefficients.plus[step] + coefficients.minus[step]).sum(0)
        torch.testing.assert_close(total, torch.full((2,), 5.0))


def test_statistics_are_those_of_all_ranks():
    """Two ranks have the same coefficients as one process with all images, except for the order of training."""
    scores = torch.rand(12, 2, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(4).repeat_interleave(3)
    whole = coefficients_of(scores, groups, FixedWeights(), Plan(12, 1, 3, 1))
    halves = list(scores.split(6))
    for rank, half in enumerate(halves):
        part = coefficients_of(half, groups[:6], FixedWeights(), Plan(6, 1, 3, 1), rank, halves)
        torch.testing.assert_close(part.plus / 2, whole.plus[6 * rank : 6 * rank + 6])  # gradients are averaged over ranks


def test_merged_rewards_have_one_column():
    scores = torch.tensor([[1.0, 3.0], [2.0, torch.nan], [0.0, 0.0], [4.0, 4.0]])
    coefficients = coefficients_of(scores, torch.tensor([0, 0, 1, 1]), WeightedSum(), Plan(4, 1, 2, 1))
    assert coefficients.plus.shape == (4, 1)
    assert coefficients.plus[0] == coefficients.plus[1]  # 2 and 2: the mean leaves out the missing reward
    assert coefficients.plus[3] > coefficients.plus[2]


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="= 5 x 2 = 10. Found 12"):
        Plan(images=12, times=1, batch_size=5, optimizer_steps=2)


def test_coefficients_add_up_over_each_step_of_every_inner_epoch():
    """Inner epochs divide images into steps differently; over each, a reward's coefficients add up to A_max / beta."""
    scores = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    scores[:5, 1] = torch.nan
    plan, keys = Plan(12, 1, 3, 2, inner_epochs=2), [KEY, (*KEY[:-1], "train 1")]
    trainer = SimpleNamespace(strategy=Ranks(0, [scores]), global_rank=0)
    groups = torch.arange(4).repeat_interleave(3)
    balancer = FixedWeights()
    balancer.bind(["a", "b"])
    epochs = compute_coefficients(scores, groups, balancer, Objective(beta=1.0), plan, keys, trainer)
    assert plan.total == 2 * 2 * 2
    orders = [image_order(plan, key) for key in keys]
    assert not torch.equal(*orders)
    for order, (plus, minus) in zip(orders, epochs, strict=True):
        for step in order.chunk(2):
            torch.testing.assert_close((plus + minus)[step].sum(0), torch.full((2,), 5.0))


def test_positive_only_ignores_negative_advantages():
    scores, groups = torch.tensor([[0.0], [1.0], [0.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    plus, minus = coefficients_of(scores, groups, FixedWeights(), Plan(4, 1, 2, 1), advantage_mode="positive_only")
    torch.testing.assert_close(plus[[0, 2]], minus[[0, 2]])  # the worse images count as neither good nor bad
    assert (plus[[1, 3]] > minus[[1, 3]]).all()
