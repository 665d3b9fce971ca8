"""The min-norm program: its properties, then agreement with independent solvers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torchjd.aggregation import MGDA

from balancers import min_norm_weights


def gram_of(k: int, rank: int, seed: int) -> torch.Tensor:
    rows = torch.randn(k, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.T


def value(gram: torch.Tensor, weights: torch.Tensor) -> float:
    return (weights @ gram @ weights).item()


def scipy_minimum(gram: torch.Tensor, floor: float = 0.0, only_centre: bool = False) -> float:
    """Smallest value that SLSQP reaches from the centre and, unless `only_centre`, from every vertex."""
    g, k = gram.numpy() / gram.diagonal().mean().item(), len(gram)
    starts = [torch.full((k,), 1 / k)] if only_centre else [torch.full((k,), 1 / k), *torch.eye(k)]
    results = [
        minimize(
            lambda w: w @ g @ w,
            floor + (1 - k * floor) * start.numpy(),
            jac=lambda w: 2 * g @ w,
            bounds=[(floor, 1)] * k,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: 0 * w + 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        ).fun
        for start in starts
    ]
    return min(results) * gram.diagonal().mean().item()


grams = st.builds(gram_of, st.integers(2, 6), st.integers(1, 7), st.integers(0, 10_000))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grams)
def test_weights_are_on_the_simplex_and_the_update_opposes_no_reward(gram):
    weights = min_norm_weights(gram)
    size = gram.diagonal().mean()
    assert (weights >= 0).all()
    assert abs(weights.sum().item() - 1) < 1e-12
    # The optimality condition of the program: every gradient's inner product is at least the squared length.
    assert (gram @ weights >= value(gram, weights) - 1e-7 * size).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(grams, st.sampled_from([1e-12, 1e-3, 1e6, 1e20]))
def test_scale_of_the_gram_does_not_matter(gram, factor):
    torch.testing.assert_close(min_norm_weights(gram * factor), min_norm_weights(gram), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(grams, st.randoms(use_true_random=False))
def test_permuting_rewards_permutes_weights(gram, random):
    order = list(range(len(gram)))
    random.shuffle(order)
    torch.testing.assert_close(min_norm_weights(gram[order][:, order]), min_norm_weights(gram)[order], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2, max_size=5),
)
def test_degenerate_integer_gradients(rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    gram = rows @ rows.T
    weights = min_norm_weights(gram)
    assert weights.isfinite().all()
    assert (gram @ weights >= value(gram, weights) - 1e-6).all()


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_value_agrees_with_scipy(k, rank, floor):
    for seed in range(2):
        gram = gram_of(k, rank, seed)
        minimum, expected = value(gram, min_norm_weights(gram, floor)), scipy_minimum(gram, floor)
        assert minimum <= expected * (1 + 1e-6) + 1e-9 * gram.diagonal().mean().item()


KINDS = ("random", "rank one", "opposite", "duplicate", "zero")


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 100), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_grams_agree_with_scipy(kind, seeds):
    """A hundred of each kind with rows of lengths from 1e-6 to 1e6, scaled to unit length as in MARBLE."""
    for seed in seeds:
        draw = torch.Generator().manual_seed(1000 * KINDS.index(kind) + seed)
        k = 2 + seed % 5
        rows = torch.randn(k, 1 if kind == "rank one" else 8, dtype=torch.float64, generator=draw)
        if kind in ("opposite", "duplicate"):
            rows[-1] = rows[0] if kind == "duplicate" else -rows[0]
        rows *= 10 ** (12 * torch.rand(k, 1, dtype=torch.float64, generator=draw) - 6)
        if kind == "zero":
            rows[-1] = 0
        norms = rows.norm(dim=1, keepdim=True)
        unit = rows / torch.where(norms > 0, norms, 1)
        gram = unit @ unit.T
        assert value(gram, min_norm_weights(gram)) == pytest.approx(scipy_minimum(gram, only_centre=True), abs=1e-6)


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_direction_agrees_with_torchjd(rank):
    rows = torch.randn(4, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    expected = MGDA(epsilon=1e-9, max_iters=3_000)(rows)
    direction = min_norm_weights(rows @ rows.T) @ rows
    # Frank-Wolfe approaches the minimum slowly and from above.
    assert direction.norm() <= expected.norm() + 1e-9
    torch.testing.assert_close(direction, expected, rtol=0, atol=2e-2)


def test_a_zero_row_gets_all_the_weight():
    weights = min_norm_weights(torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3)], ids=["zero", "identical", "equal"])
def test_symmetric_rewards_have_equal_weights(gram):
    torch.testing.assert_close(min_norm_weights(gram.double()), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_opposite_rows_cancel():
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    weights = min_norm_weights(gram)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-12)
    assert value(gram, weights) < 1e-15


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_near_dependent_rows(gap):
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, gap, 0.0], [1.0, 0.0, gap]], dtype=torch.float64)
    gram = rows @ rows.T
    assert value(gram, min_norm_weights(gram)) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("rows", [[[2.0], [1.0]], [[1.0, 0.0], [0.0, 2.0]]])
def test_two_rewards_closed_form(rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    a, b = rows
    first = ((b - a) @ b / (a - b).square().sum()).clamp(0, 1)
    torch.testing.assert_close(min_norm_weights(rows @ rows.T), torch.stack([first, 1 - first]), rtol=0, atol=1e-7)


def test_single_reward_has_weight_one():
    assert min_norm_weights(torch.tensor([[3.0]])).tolist() == [1.0]


def test_batched_equals_looped():
    gram = torch.stack([gram_of(4, rank, seed) for rank in (1, 2, 4, 6) for seed in range(2)]).reshape(4, 2, 4, 4)
    looped = torch.stack([min_norm_weights(g) for g in gram.reshape(-1, 4, 4)]).reshape(4, 2, 4)
    torch.testing.assert_close(min_norm_weights(gram), looped, rtol=0, atol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.25])
def test_floor_is_respected(floor):
    gram = torch.diag(torch.tensor([1.0, 0.0, 5.0, 9.0], dtype=torch.float64))
    weights = min_norm_weights(gram, floor)
    assert (weights >= floor - 1e-15).all()
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weights[2:], torch.full((2,), floor, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_gradcheck(k, floor):
    gram = gram_of(k, k + 3, seed=k).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: min_norm_weights(g, floor), gram, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    assert min_norm_weights(torch.eye(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("gram", "floor", "message"),
    [
        (torch.full((2, 2), torch.nan), 0.0, "`gram` must be finite. Found NaN"),
        (torch.full((1, 1), torch.inf), 0.0, "`gram` must be finite. Found NaN"),
        (torch.ones(2, 3), 0.0, r"`gram` must have shape .* Found \(2, 3\)"),
        (torch.eye(2), 0.6, "`floor` must be >= 0 and at most 1 / 2 for 2 rewards. Found 0.6"),
        (torch.eye(2), -0.1, "`floor` must be >= 0 .* Found -0.1"),
    ],
)
def test_errors(gram, floor, message):
    with pytest.raises(ValueError, match=message):
        min_norm_weights(gram, floor)
