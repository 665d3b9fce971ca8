"""Cosines from inner products, compared with cosines from the vectors."""

import pytest
import torch

from balancers import cosines, gramian
from balancers.gramian import agreement, compare, conflict_by_chance, gram_matrix, in_conflict


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_cosines_equal_those_of_the_vectors(rank):
    rows = torch.randn(4, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    coefficients = torch.tensor([0.1, 0.7, -0.4, 2.0], dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(rows, (coefficients @ rows)[None])
    torch.testing.assert_close(cosines(rows @ rows.T, coefficients), expected)
    torch.testing.assert_close(cosines(rows @ rows.T, 1e6 * coefficients), expected)


def test_vectors_of_rounding_errors_have_cosine_zero():
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert cosines(opposite, torch.tensor([0.5, 0.5])).tolist() == [0, 0]
    assert cosines(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 1.0])).tolist() == [1, 0]
    assert not in_conflict(compare(opposite, {"update": torch.tensor([0.5, 0.5])})["update/cos_min"])


def test_gram_matrix_is_float64_and_the_same_in_chunks(monkeypatch):
    rows = 1e25 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))  # squares overflow float32
    expected = rows.double() @ rows.double().T
    monkeypatch.setattr(gramian, "CHUNK", 7)
    torch.testing.assert_close(gram_matrix(rows), expected)


def test_a_non_finite_gradient_affects_only_its_own_products():
    rows = torch.eye(3)
    rows[1, 1] = torch.nan
    gram = gram_matrix(rows)
    assert gram[1].isnan().all()
    assert gram[0, 0] == gram[2, 2] == 1
    assert gram[0, 2] == 0


def test_agreement_equals_compare_for_its_directions():
    rows = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    weights, units = torch.tensor([0.2, 0.5, 0.3]), rows / rows.norm(dim=1, keepdim=True)
    directions = {"update": weights @ rows, "mean": rows.mean(0), "unit_mean": units.mean(0)}
    assert agreement(directions, rows) == pytest.approx(compare(gram_matrix(rows), {"update": weights}), abs=1e-6)
    statistics = agreement({"against": -rows[0], "along": rows[0]}, rows[:1])
    assert statistics["against/cos_min"] == pytest.approx(-1) and statistics["along/cos_min"] == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_conflict_by_chance_with_orthogonal_gradients(k):
    lengths = torch.linspace(0.1, 10, k)
    assert conflict_by_chance(torch.diag(lengths)) == pytest.approx(1 - 2.0**-k, abs=2e-4)


def test_conflict_by_chance_equals_that_of_random_directions():
    half = torch.eye(5) / 2 + 0.5
    assert conflict_by_chance(half) == pytest.approx(1 - 1 / 6, abs=2e-4)  # 1 / (K + 1) for correlations of 1/2
    assert conflict_by_chance(torch.ones(4, 4)) == pytest.approx(0.5, abs=2e-4)
    assert conflict_by_chance(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx(1, abs=2e-4)
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 6, generator=draws)
    signs = torch.randn(200_000, 6, generator=draws) @ rows.T
    assert conflict_by_chance(rows @ rows.T) == pytest.approx(float((signs.min(1).values < 0).double().mean()), abs=5e-3)
