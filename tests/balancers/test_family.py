"""PCGrad, CAGrad, MGDA and AdvantageSum: agreement with the TorchJD library, and properties of all methods."""

from functools import partial

import pytest
import torch
from torchjd import aggregation

from balancers import GEM, MARBLE, MGDA, AdvantageSum, CAGrad, FixedWeights, OutcomeGuard, PCGrad, TorchJD, min_norm_weights
from balancers.cagrad import conflict_averse
from balancers.pcgrad import projection_weights
from tests.helpers.small_balancers import gram_of

NAMES = ("a", "b", "c", "d", "e")
METHODS = [MARBLE, MGDA, PCGrad, CAGrad, FixedWeights, TorchJD, OutcomeGuard, partial(GEM, primary="a")]


def bound(balancer, names=NAMES):
    balancer.bind(names)
    return balancer


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_equals_torchjd_for_the_same_order(seed):
    gram = gram_of(seed, push=0.8)
    torch.manual_seed(seed)
    expected = aggregation.PCGradWeighting()(gram)
    torch.manual_seed(seed)
    orders = [torch.randperm(5).tolist() for _ in range(5)]
    torch.testing.assert_close(projection_weights(gram, orders), expected)
    assert not torch.equal(expected, torch.ones(5))


def test_the_order_of_pcgrad_depends_on_the_step_only():
    gram = gram_of(3, push=0.9)
    first, second = bound(PCGrad()), bound(PCGrad())
    assert torch.equal(first.weights(gram), second.weights(gram))
    assert bound(PCGrad()).weights(torch.eye(5)).tolist() == [0.2] * 5  # nothing conflicts: the plain mean
    by_step = []
    for first.step in range(6):
        by_step.append(first.weights(gram))
    assert len({tuple(weights.tolist()) for weights in by_step}) > 1


def seeds(quick: int, all_of_them: int) -> list:
    """Seeds of a test, of which plain `pytest` runs the first ones."""
    later = [pytest.param(seed, marks=pytest.mark.integration) for seed in range(quick, all_of_them)]
    return [*range(quick), *later]


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("seed", seeds(2, 8))
def test_cagrad_equals_torchjd_or_is_better(seed, c):
    """TorchJD's cone program stops slightly early: the update is equal, and its smallest inner product no smaller."""
    gram = gram_of(seed, push=0.5)
    expected = aggregation.CAGradWeighting(c=c, norm_eps=1e-9)(gram)
    weights = conflict_averse(gram, c)
    length = float((expected @ gram @ expected).sqrt())
    assert float(((weights - expected) @ gram @ (weights - expected)).clamp(min=0).sqrt()) < 1e-3 * length
    assert (gram @ weights).min() >= (gram @ expected).min() - 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_cagrad_maximises_the_smallest_inner_product_in_its_ball(seed):
    """No other point of the ball has a larger smallest inner product with a gradient."""
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = gradients @ gradients.T
    d, mean = conflict_averse(gram, 0.4) @ gradients, gradients.mean(0)
    radius = 0.4 * mean.norm()
    assert float((d - mean).norm()) == pytest.approx(float(radius), rel=1e-6)
    others = torch.randn(4000, 6, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    others = mean + radius * others / others.norm(dim=1, keepdim=True)
    near = d + 0.01 * (others - d)
    near = mean + (near - mean) * (radius / (near - mean).norm(dim=1, keepdim=True)).clamp(max=1)
    best = max((group @ gradients.T).min(1).values.max() for group in (others, near))
    assert (gradients @ d).min() >= best - 1e-9


def test_cagrad_edges():
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert conflict_averse(opposite, 0.4).tolist() == [0.5, 0.5]
    gram = gram_of(0)
    assert conflict_averse(gram, 0.0).tolist() == pytest.approx([0.2] * 5)
    torch.testing.assert_close(conflict_averse(gram * 1e12, 0.4), conflict_averse(gram, 0.4), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"`c` must be finite and >= 0. Found -1"):
        CAGrad(c=-1)


@pytest.mark.parametrize("seed", seeds(3, 10))
def test_mgda_equals_torchjd(seed):
    """TorchJD approaches the point iteratively (Frank-Wolfe), so the norms are compared."""
    gram = gram_of(seed, push=0.5)
    expected = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=4_000)(gram)
    weights = bound(MGDA()).weights(gram)
    assert weights @ gram @ weights <= expected @ gram @ expected + 1e-9
    assert weights @ gram @ weights == pytest.approx(float(expected @ gram @ expected), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("method", [MARBLE, MGDA, CAGrad, FixedWeights, TorchJD])
@pytest.mark.parametrize("seed", range(3))
def test_permutation_of_the_rewards_permutes_the_weights(method, seed):
    gram, order = gram_of(seed, push=0.3), torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    balancer = bound(method())
    torch.testing.assert_close(balancer.weights(gram[order][:, order]), balancer.weights(gram)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_gram_matrix_of_any_method(method):
    """Any dtype is converted to float64, a zero matrix gives uniform weights, and errors name non-finite rewards."""
    balancer = bound(method())
    for seed in range(2):
        gram = gram_of(seed, push=0.3)
        gram[3] = gram[:, 3] = gram[3] * (seed % 2)  # a zero row for every other seed
        expected = balancer.weights(gram)
        assert expected.dtype == torch.float64 and expected.isfinite().all()
        torch.testing.assert_close(balancer.weights(gram.float()), expected, rtol=1e-3, atol=1e-3)
        if seed % 2:
            for scale in (1e-12, 1e12):  # gradients from 1e-6 to 1e6
                torch.testing.assert_close(balancer.weights(gram * scale), expected, rtol=1e-4, atol=1e-5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.testing.assert_close(balancer.weights(torch.zeros(5, 5, dtype=dtype)), torch.full((5,), 0.2).double())
    for value in (torch.nan, torch.inf, -torch.inf):
        gram = gram_of(0)
        gram[1] = gram[:, 1] = value
        with pytest.raises(ValueError, match=r"`gram` must be finite. Found NaN or infinity in the inner products of b\."):
            balancer.weights(gram)
    with pytest.raises(ValueError, match=r"`gram` must have shape \(K, K\) with K >= 1. Found \(5, 4\)"):
        balancer.weights(torch.ones(5, 4))


@pytest.mark.parametrize("method", [MGDA, PCGrad, CAGrad, TorchJD])
def test_weights_of_an_unbound_method(method):
    torch.testing.assert_close(method().weights(gram_of(0).float()), bound(method()).weights(gram_of(0).float()))
    with pytest.raises(ValueError, match=r"inner products of row 0, row 1\."):
        method().weights(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_an_inactive_reward_does_not_zero_the_update(method, value):
    balancer = bound(method(normalize=True))
    gradients = torch.randn(5, 12, generator=torch.Generator().manual_seed(5))
    gradients[2] = value
    balancer.begin_step(1)
    balancer.add_gradients(gradients)
    merged = balancer.solve(lambda x: x)
    assert merged.isfinite().all() and merged.norm() > 0.1
    assert balancer.diagnostics["left_out"] == {"c": "zero" if value == 0 else "not finite"}


def test_advantage_sum_by_hand():
    advantages = torch.tensor([[1.0, 2.0], [-1.0, torch.nan], [torch.nan, torch.nan], [3.0, -2.0]])
    balancer = bound(AdvantageSum({"b": 0.5}), ("a", "b"))
    summed = torch.tensor([2.0, -1.0, 2.0])
    expected = (summed - summed.mean()) / (summed.std(correction=0) + 1e-4)
    merged = balancer.merge_advantages(advantages)[:, 0]
    torch.testing.assert_close(merged[[0, 1, 3]], expected)
    assert merged[2].isnan()
    assert balancer.names == ("sum",)


def test_progress_is_proportional_to_preference():
    """Inner products of unit gradients with the update are proportional to the preference."""
    gram = torch.eye(3, dtype=torch.float64)
    balancer = bound(MARBLE(preference={"b": 2.0}), ("a", "b", "c"))
    torch.testing.assert_close(gram @ balancer.weights(gram), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`preference` must be finite and > 0 in float32. Found {'b': 0.0}"):
        bound(MARBLE(preference={"b": 0.0}))


def test_groups_share_one_weight():
    gram = torch.eye(3, dtype=torch.float64)
    balancer = bound(MARBLE(groups={"people": ["a", "c"]}), ("a", "b", "c"))
    weight = 0.5**0.5  # of b relative to the mean of a and c, which has length sqrt(1/2)
    expected = torch.tensor([0.5, weight, 0.5], dtype=torch.float64) / (1 + weight)
    torch.testing.assert_close(balancer.weights(gram), expected)
    opposed = torch.tensor([[1.0, 0.0, -0.92], [0.0, 1.0, 0.0], [-0.92, 0.0, 1.0]], dtype=torch.float64)
    alone = bound(MARBLE(), ("a", "b", "c")).weights(opposed)
    assert alone[1] < 0.05  # the opposed pair gets nearly all the weight
    grouped = balancer.weights(opposed)
    mean = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    progress_of_mean, progress_of_b = grouped @ opposed @ mean / (mean @ opposed @ mean).sqrt(), (grouped @ opposed)[1]
    assert float(progress_of_mean) == pytest.approx(float(progress_of_b))  # although the mean has length 0.2
    opposed[0, 2] = opposed[2, 0] = -1.0  # the pair cancels
    torch.testing.assert_close(balancer.weights(opposed), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    for wrong, message in (
        ({"g": ["typo"]}, "must use the names"),
        ({"g": ["a"], "h": ["a"]}, "must hold a reward once"),
        ({"g": []}, "at least one reward each"),
    ):
        with pytest.raises(ValueError, match=message):
            bound(MARBLE(groups=wrong), ("a", "b", "c"))


def test_a_short_gradient_counts_as_in_mgda():
    """Without `normalize`, lengths decide; only the mean of several rewards counts as cancelled."""
    gram = torch.tensor([[1.0, 0.0], [0.0, 2.5e-7]], dtype=torch.float64)  # lengths 1 and 5e-4
    expected = bound(MGDA(), ("a", "b")).weights(gram)
    assert expected[1] > 0.999
    torch.testing.assert_close(bound(MARBLE(normalize=False), ("a", "b")).weights(gram), expected, rtol=0, atol=1e-9)
    opposed = torch.tensor([[1.0, 5e-7 - 1.0], [5e-7 - 1.0, 1.0]], dtype=torch.float64)  # the mean has length 5e-4 too
    grouped = bound(MARBLE(normalize=False, groups={"pair": ["c", "d"]}), ("a", "b", "c", "d"))
    weights = grouped.weights(torch.block_diag(gram, opposed))
    torch.testing.assert_close(weights, torch.cat([expected, torch.zeros(2)]), rtol=0, atol=1e-9)


def progress(balancer: MARBLE, gradients: torch.Tensor, combinations: torch.Tensor) -> torch.Tensor:
    """Cosines of the update of a refresh with combinations of the unit gradients, one per row of `combinations`."""
    balancer.begin_step(1)
    balancer.add_gradients(gradients)
    update = balancer.solve(lambda x: x).double()
    units = gradients.double() / gradients.double().norm(dim=1, keepdim=True)
    return torch.nn.functional.cosine_similarity(combinations.double() @ units, update[None])


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 300), marks=pytest.mark.slow)], ids=str)
def test_the_update_opposes_no_group_and_no_reward_outside_groups(monkeypatch, seeds):
    monkeypatch.setattr("balancers.marble.sensitivity", lambda gram, floor: torch.zeros_like(gram[0]))  # only logged; slow
    a, b, c = [0.5, 0.866, 0.0], [0.5, -0.866, 0.0], [-0.9, 0.0, 0.436]
    balancer = bound(MARBLE(groups={"g": ["a", "b"]}), ("a", "b", "c"))
    cos = progress(balancer, torch.tensor([a, b, c]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert cos.tolist() == pytest.approx([0.22, 0.22], abs=0.01)
    combinations = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    for seed in seeds:
        draws = torch.Generator().manual_seed(seed)
        gradients = torch.randn(5, 12, generator=draws) * 10 ** torch.rand(5, 1, generator=draws)
        balancer = bound(MARBLE(groups={"g": ["a", "b"], "h": ["c", "d"]}))
        assert progress(balancer, gradients, combinations).min() > -1e-5


def test_floor_counts_groups():
    bound(MARBLE(floor=0.5, groups={"people": ["a", "c"]}), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"at most 1 / 3"):
        bound(MARBLE(floor=0.5), ("a", "b", "c"))


def test_dropout_and_its_ramp(monkeypatch):
    monkeypatch.setattr("balancers.marble.sensitivity", lambda gram, floor: torch.zeros_like(gram[0]))  # only logged; slow
    gram = torch.eye(5, dtype=torch.float64)
    balancer = bound(MARBLE(dropout=0.6, dropout_ramp=1000))
    shares = []
    for steps in (range(0, 300, 4), range(1700, 2000, 4)):
        zeros = []
        for balancer.step in steps:
            weights = balancer.weights(gram)
            assert weights.sum() == pytest.approx(1)
            zeros.append(float((weights == 0).double().mean()))
        shares.append(sum(zeros) / len(zeros))
    early, late = shares
    assert early < 0.2 < 0.5 < late < 0.7
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\). Found 1"):
        MARBLE(dropout=1.0)


def test_sensitivity_is_in_the_diagnostics():
    """The derivative through qpth equals finite differences."""
    balancer = bound(MARBLE(), ("a", "b"))
    gram = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64)
    balancer.weights(gram)
    sensitivity = balancer.diagnostics["sensitivity"]

    step, rows = 1e-5, torch.zeros(2, 2, 2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            moved = torch.zeros_like(gram)
            moved[i, j] = step
            rows[:, i, j] = (min_norm_weights(gram + moved) - min_norm_weights(gram - moved)) / (2 * step)
    expected = ((rows + rows.mT) / 2).flatten(1).norm(dim=1)
    torch.testing.assert_close(sensitivity, expected, rtol=1e-4, atol=1e-7)
