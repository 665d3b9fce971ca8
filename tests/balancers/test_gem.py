"""GEM: the conditions of its optimum, the program against SciPy, and the primary reward."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from balancers import GEM
from balancers.gem import nearest_without_conflict
from tests.helpers.small_balancers import NAMES, bound, gradients_of, step


def rows_of(seed: int, opposed: bool = False) -> torch.Tensor:
    """Gradients of 2 to 6 rewards of rank 1, 2, 3 or 8, lengths 1e-3 to 1e3; `opposed`: the last to the first."""
    draws = torch.Generator().manual_seed(seed)
    k, rank = 2 + seed % 5, (1, 2, 3, 8)[seed % 4]
    rows = torch.randn(k, rank, generator=draws, dtype=torch.float64)
    if opposed:
        rows[-1] = -rows[0]
    return rows * 10 ** (6 * torch.rand(k, 1, generator=draws, dtype=torch.float64) - 3)


def units(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("opposed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_update_is_optimal_and_opposes_no_reward(seed, opposed):
    """The conditions of the optimum: no conflict, weights >= 0, and a weight only where an inner product is zero."""
    rows = rows_of(seed, opposed)
    weights, length = nearest_without_conflict(rows @ rows.T, 0), rows[0].norm()
    products = units(rows)[1:] @ (weights @ rows) / length
    shares = weights[1:] * rows[1:].norm(dim=1) / length
    assert products.min() > -1e-6
    assert weights[0] == 1 and (weights >= 0).all()
    assert (shares * products).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_the_program_itself_is_solved(seed):
    """The nearest point of the cone of allowed directions, by SciPy's solver of the program in the space of gradients."""
    rows = units(rows_of(seed))
    first = rows[0].numpy()
    constraints = [{"type": "ineq", "fun": lambda d, row=row: row @ d} for row in rows[1:].numpy()]
    solution = minimize(
        lambda d: ((d - first) ** 2).sum(), np.zeros_like(first), constraints=constraints, options={"ftol": 1e-14}
    )
    update = nearest_without_conflict(rows @ rows.T, 0) @ rows
    torch.testing.assert_close(update, torch.tensor(solution.x), rtol=0, atol=1e-5)


def test_by_hand():
    opposing = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]])
    merged, _ = step(bound(GEM(primary="clip")), opposing)
    torch.testing.assert_close(merged, torch.tensor([0.5, 0.5]))  # the part of (1, 0) along the border of the half-plane
    agreeing = torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, -1.0]])
    merged, weights = step(bound(GEM(primary="clip")), agreeing)
    torch.testing.assert_close(merged, agreeing[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    merged, _ = step(bound(GEM(primary="clip")), opposite)
    torch.testing.assert_close(merged, torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("primary", NAMES)
@pytest.mark.parametrize("normalize", [True, False])
def test_any_reward_can_be_the_primary_one(primary, normalize):
    """With `normalize` only the length of the update changes."""
    gradients = gradients_of(4) * torch.tensor([[1.0], [10.0], [0.1]])
    merged, _ = step(bound(GEM(primary=primary, normalize=normalize)), gradients)
    index = NAMES.index(primary)
    expected = nearest_without_conflict(gradients.double() @ gradients.double().T, index).float() @ gradients
    torch.testing.assert_close(merged / merged.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert (gradients @ merged > -1e-5).all() and gradients[index] @ merged > 0


def test_an_inactive_primary_reward_gives_no_update():
    merged, _ = step(bound(GEM(primary="ocr")), torch.diag(torch.tensor([1.0, 0.0, 1.0])))
    assert merged.tolist() == [0.0, 0.0, 0.0]
    merged, _ = step(bound(GEM(primary="pick")), torch.diag(torch.tensor([1.0, 0.0, 1.0])))
    torch.testing.assert_close(merged, torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)


def test_the_primary_reward_must_exist():
    with pytest.raises(ValueError, match=r"`primary` must use the names of the rewards: clip, ocr, pick. Found typo"):
        bound(GEM(primary="typo"))
