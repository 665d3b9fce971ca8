"""How well an update agrees with each reward's gradient, from inner products alone."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from scipy.stats import multivariate_normal
from torch import Tensor

CHUNK = 2**20
"""Columns widened to float64 at a time, so that a Gram matrix never doubles the memory of the gradients."""


def gram_matrix(gradients: Float[Tensor, "reward parameter"]) -> Float[Tensor, "reward reward"]:
    r"""Inner products $G_{jk} = \langle g_j, g_k \rangle$ in float64, on the CPU.

    What follows is K x K algebra, for which launching kernels would cost more than computing.

    Shape:
        gradients (K, P) -> (K, K).
    """
    # Apple's GPUs have no float64: there the products are float32, and only their sum is wide.
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for chunk in gradients.detach().split(CHUNK, dim=1):
        chunk = chunk.to(wide)
        gram += (chunk @ chunk.T).cpu()
    return gram


def cosines(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, "reward"]) -> Float[Tensor, "reward"]:
    r"""Cosine between the update $d = \sum_k c_k g_k$ and each $g_k$: $(G c)_k / (\sqrt{c^\top G c}\, \sqrt{G_{kk}})$.

    A cosine with a vector too short to tell from rounding (the update of two opposite gradients, a zero gradient) is 0.

    Shape:
        gram (K, K), coefficients (K,) -> (K,), dtype of `gram`.

    >>> cosines(torch.eye(2), torch.tensor([1.0, 1.0]))
    tensor([0.7071, 0.7071])
    """
    coefficients = coefficients.to(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    # Squares lose half the digits: what is left of an update below sqrt(eps) of its terms is rounding.
    rounding = torch.finfo(gram.dtype).eps ** 0.5 * (coefficients.abs() @ norms)
    defined = (norms > 0) & (length > rounding)
    return torch.where(defined, (gram @ coefficients) / torch.where(defined, length * norms, 1), 0).clamp(-1, 1)


def compare(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, "reward"]) -> dict[str, float]:
    r"""Harmony of an update $\sum_k c_k g_k$, of the mean $\tfrac1K \sum_k g_k$, and of the mean of unit gradients.

    The paper's three figures, least, mean and (population) variance over the rewards of `cosines`, under the keys
    `update/cos_min`, `update/cos_mean`, `update/cos_var`, and the same for `mean/...` and `unit_mean/...`.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.

    Shape:
        gram (K, K), coefficients (K,).
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    units = torch.where(norms > 0, 1 / norms, 0)
    directions = {"update": coefficients, "mean": torch.ones_like(coefficients), "unit_mean": units}
    return {name: value for title, c in directions.items() for name, value in _figures(title, cosines(gram, c)).items()}


def agreement(
    directions: Mapping[str, Float[Tensor, "parameter"]], gradients: Float[Tensor, "reward parameter"]
) -> dict[str, float]:
    """What `compare` tells, of any directions, and gradients of any samples, not only those they come from.

    Shape:
        directions (P,) each, by the name their figures are to have; gradients (K, P).
    """
    gram = gram_matrix(torch.cat([gradients, *(direction[None] for direction in directions.values())]))
    rows = torch.eye(len(gram), dtype=gram.dtype)[len(gradients) :]
    found = {title: cosines(gram, row)[: len(gradients)] for title, row in zip(directions, rows, strict=True)}
    return {name: value for title, cos in found.items() for name, value in _figures(title, cos).items()}


def conflict_by_chance(gram: Float[Tensor, "reward reward"]) -> float:
    r"""How often a direction that knows nothing of the gradients goes against one of them.

    Its cosines with them have the signs of $x \sim N(0, C)$, C the gradients' cosines with each other, so this is
    $1 - P(x_1 > 0, \dots, x_K > 0)$: $1 - 2^{-K}$ where they are orthogonal, 97 % for five. A conflict rate near it says
    that there is no signal, not that rewards conflict. To about 1e-4; by SciPy's integration, always with the same seed.

    Shape:
        gram (K, K), of gradients that are not zero.

    >>> round(conflict_by_chance(torch.eye(5)), 3)
    0.969
    """
    norms = gram.diagonal().sqrt()
    correlations = (gram / norms.outer(norms)).double().numpy()
    chance = multivariate_normal(cov=correlations, allow_singular=True, seed=0, abseps=1e-4, releps=1e-4, maxpts=100_000)
    return 1 - float(chance.cdf([0.0] * len(gram)))


def _figures(title: str, cos: Float[Tensor, "reward"]) -> dict[str, float]:
    figures = {"cos_min": cos.min(), "cos_mean": cos.mean(), "cos_var": cos.var(correction=0)}
    return {f"{title}/{name}": value.item() for name, value in figures.items()}


def in_conflict(cos_min: float) -> bool:
    """Whether an update goes against some reward by more than rounding."""
    return cos_min < -1e-6
