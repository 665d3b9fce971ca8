"""Agreement of an update with each reward's gradient, computed from inner products alone."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from scipy.stats import multivariate_normal
from torch import Tensor

CHUNK = 2**20
"""Columns converted to float64 at a time, so that a Gram matrix never doubles the memory of the gradients."""


def gram_matrix(
    gradients: Float[Tensor, "reward parameter"], others: Float[Tensor, "reward parameter"] | None = None
) -> Float[Tensor, "reward reward"]:
    r"""Inner products $G_{jk} = \langle g_j, g_k \rangle$ in float64, on the CPU; with `others` $\langle g_j, h_k \rangle$.

    On the CPU, since for the K x K algebra that follows, launching GPU kernels would take longer than computing.

    Shape:
        gradients (K, P), others (K, P) -> (K, K).
    """
    # Apple's GPUs have no float64: there the products are float32, and only their sum is float64.
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    others = gradients if others is None else others
    for chunk, other in zip(gradients.detach().split(CHUNK, dim=1), others.detach().split(CHUNK, dim=1), strict=True):
        chunk = chunk.to(wide)
        gram += (chunk @ (chunk if others is gradients else other.to(wide)).T).cpu()
    return gram


def cosines(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, " reward"]) -> Float[Tensor, " reward"]:
    r"""Cosine between the update $d = \sum_k c_k g_k$ and each $g_k$: $(G c)_k / (\sqrt{c^\top G c}\, \sqrt{G_{kk}})$.

    A cosine is 0 if a vector is no longer than its rounding error (the update of two opposite gradients, a zero gradient).

    Shape:
        gram (K, K), coefficients (K,) -> (K,), dtype of `gram`.

    >>> cosines(torch.eye(2), torch.tensor([1.0, 1.0]))
    tensor([0.7071, 0.7071])
    """
    coefficients = coefficients.to(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    # Squares lose half the digits: an update shorter than sqrt(eps) times its terms consists of rounding errors.
    rounding = torch.finfo(gram.dtype).eps ** 0.5 * (coefficients.abs() @ norms)
    defined = (norms > 0) & (length > rounding)
    return torch.where(defined, (gram @ coefficients) / torch.where(defined, length * norms, 1), 0).clamp(-1, 1)


def compare(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, " reward"]) -> dict[str, float]:
    r"""Gradient harmony of an update $\sum_k c_k g_k$, of the mean $\tfrac1K \sum_k g_k$, and of the mean unit gradient.

    The paper's three statistics are the minimum, mean and (population) variance of `cosines` over the rewards. Their keys
    are `update/cos_min`, `update/cos_mean`, `update/cos_var`, and the same for `mean/...` and `unit_mean/...`.

    Shape:
        gram (K, K), coefficients (K,).

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    units = torch.where(norms > 0, 1 / norms, 0)
    directions = {"update": coefficients, "mean": torch.ones_like(coefficients), "unit_mean": units}
    return {key: value for name, c in directions.items() for key, value in _statistics(name, cosines(gram, c)).items()}


def agreement(
    directions: Mapping[str, Float[Tensor, " parameter"]], gradients: Float[Tensor, "reward parameter"]
) -> dict[str, float]:
    """Gradient harmony as in `compare`, of any directions with any gradients, which may come from other samples.

    Args:
        directions: Directions by the prefix of their keys in the result.
        gradients: One row per reward.

    Shape:
        directions (P,) each, gradients (K, P).
    """
    gram = gram_matrix(torch.cat([gradients, *(direction[None] for direction in directions.values())]))
    rows = torch.eye(len(gram), dtype=gram.dtype)[len(gradients) :]
    by_direction = {name: cosines(gram, row)[: len(gradients)] for name, row in zip(directions, rows, strict=True)}
    return {key: value for name, cos in by_direction.items() for key, value in _statistics(name, cos).items()}


def conflict_by_chance(gram: Float[Tensor, "reward reward"]) -> float:
    r"""Probability that a random direction has a negative inner product with at least one of the gradients.

    The cosines of the direction with the gradients have the signs of $x \sim N(0, C)$, where C holds the gradients' cosines
    with each other. So the probability is $1 - P(x_1 > 0, \dots, x_K > 0)$: $1 - 2^{-K}$ for orthogonal gradients, 97 % for
    five. A conflict rate near this value shows that there is no signal, not that rewards conflict. SciPy integrates
    numerically, to about 1e-4 and always with the same seed.

    Shape:
        gram (K, K), of non-zero gradients.

    >>> round(conflict_by_chance(torch.eye(5)), 3)
    0.969
    """
    norms = gram.diagonal().sqrt()
    correlations = (gram / norms.outer(norms)).double().numpy()
    chance = multivariate_normal(cov=correlations, allow_singular=True, seed=0, abseps=1e-4, releps=1e-4, maxpts=100_000)
    return 1 - float(chance.cdf([0.0] * len(gram)))


def _statistics(prefix: str, cos: Float[Tensor, " reward"]) -> dict[str, float]:
    statistics = {"cos_min": cos.min(), "cos_mean": cos.mean(), "cos_var": cos.var(correction=0)}
    return {f"{prefix}/{name}": value.item() for name, value in statistics.items()}


def in_conflict(cos_min: float) -> bool:
    """Whether the smallest cosine of an update with a gradient is negative by more than rounding."""
    return cos_min < -1e-6
