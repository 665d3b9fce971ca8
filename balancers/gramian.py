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


def root(gram: Float[Tensor, "reward reward"]) -> Float[Tensor, "reward reward"]:
    r"""A matrix $R$ with $R R^\top = G$, whose rows have the same inner products as the gradients.

    >>> root(torch.diag(torch.tensor([1.0, 4.0]))).square().sum(1)
    tensor([1., 4.])
    """
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def cosines(
    gram: Float[Tensor, "reward reward"],
    coefficients: Float[Tensor, " reward"],
    signal: Float[Tensor, "reward reward"] | None = None,
) -> Float[Tensor, " reward"]:
    r"""Cosine between the update $d = \sum_k c_k g_k$ and each $g_k$: $(G c)_k / (\sqrt{c^\top G c}\, \sqrt{G_{kk}})$.

    With `signal` S, unbiased products such as those of halves, the numerator is $(S c)_k$. The result then has the mean of
    cosines with gradients of fresh images, and not that of the noise which d and $g_k$ share; it may exceed 1.

    A cosine is 0 if a vector is no longer than its rounding error (the update of two opposite gradients, a zero gradient).

    Shape:
        gram, signal (K, K), coefficients (K,) -> (K,), dtype of `gram`.

    >>> cosines(torch.eye(2), torch.tensor([1.0, 1.0]))
    tensor([0.7071, 0.7071])
    """
    coefficients = coefficients.to(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    # Squares lose half the digits: an update shorter than sqrt(eps) times its terms consists of rounding errors.
    rounding = torch.finfo(gram.dtype).eps ** 0.5 * (coefficients.abs() @ norms)
    defined = (norms > 0) & (length > rounding)
    cos = ((gram if signal is None else signal) @ coefficients) / torch.where(defined, length * norms, 1)
    return torch.where(defined, cos.clamp(-1, 1) if signal is None else cos, 0)


def compare(
    gram: Float[Tensor, "reward reward"],
    directions: Mapping[str, Float[Tensor, " reward"]],
    signal: Float[Tensor, "reward reward"] | None = None,
) -> dict[str, float]:
    r"""Gradient harmony of updates $\sum_k c_k g_k$, of the mean $\tfrac1K \sum_k g_k$, and of the mean unit gradient.

    The paper's three statistics are the minimum, mean and (population) variance of `cosines` over the rewards. Their keys
    are `mean/cos_min`, `mean/cos_mean`, `mean/cos_var`, and the same for `unit_mean/...` and each direction's name.

    Args:
        gram: The gradients' inner products.
        directions: Coefficients of each update, by name.
        signal: Unbiased products, see `cosines`.

    Shape:
        gram, signal (K, K), directions (K,) each.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    baselines = {"mean": torch.ones_like(norms), "unit_mean": torch.where(norms > 0, 1 / norms, 0)}
    figures: dict[str, float] = {}
    for name, coefficients in {**directions, **baselines}.items():
        figures |= statistics(name, cosines(gram, coefficients, signal))
    return figures


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
    return {key: value for name, cos in by_direction.items() for key, value in statistics(name, cos).items()}


def signal_to_noise(own: Float[Tensor, "reward reward"], split: Float[Tensor, "reward reward"]) -> Float[Tensor, " reward"]:
    r"""Length of each gradient's signal relative to its noise, $|\mu_k| / \sqrt{\operatorname{E} |\varepsilon_k|^2}$.

    $G_{kk}$ converges to $|\mu_k|^2 + \operatorname{E} |\varepsilon_k|^2$ and $S_{kk}$ to $|\mu_k|^2$. It is 0 where the
    estimate of $|\mu_k|^2$ is negative.

    Shape:
        own, split (K, K), means over refreshes -> (K,).

    >>> signal_to_noise(torch.tensor([[5.0]]), torch.tensor([[1.0]]))
    tensor([0.5000])
    """
    signal, total = split.diagonal().clamp(min=0), own.diagonal()
    return (signal / (total - signal).clamp(min=torch.finfo(total.dtype).eps * total)).sqrt()


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


def statistics(prefix: str, cos: Float[Tensor, " reward"]) -> dict[str, float]:
    """The paper's statistics of cosines (K,), with keys such as `{prefix}/cos_min`."""
    found = {"cos_min": cos.min(), "cos_mean": cos.mean(), "cos_var": cos.var(correction=0)}
    return {f"{prefix}/{name}": value.item() for name, value in found.items()}


def in_conflict(cos_min: float) -> bool:
    """Whether the smallest cosine of an update with a gradient is negative by more than rounding."""
    return cos_min < -1e-6
