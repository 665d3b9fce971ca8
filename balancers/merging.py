"""The steps between per-reward gradients and one update, as pure functions: who takes part, smoothing, merging."""

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def active_rows(norms: Float[Tensor, "reward"]) -> Bool[Tensor, "reward"]:
    """Which gradients take part: finite, and longer than the rounding that a sum of cancelling float32 terms leaves.

    A zero gradient would make the zero vector the min-norm point and stop the step for every reward; a reward that had
    nothing to tell apart leaves only rounding, which unit length would blow up to a full voice.

    Shape:
        norms (K,) -> (K,).

    >>> active_rows(torch.tensor([2.0, 0.0, torch.nan])).tolist()
    [True, False, False]
    """
    longest = norms.nan_to_num(nan=0.0, posinf=0.0).max()
    return norms.isfinite() & (norms > torch.finfo(torch.float32).eps ** 0.5 * longest)


def weigh(
    method: Callable[[Tensor], Tensor], gram: Float[Tensor, "active active"], normalize: bool
) -> Float[Tensor, "active"]:
    r"""What a method's `weights` makes of $G_{jk}$, or with `normalize` of $G_{jk} / (|g_j| |g_k|)$, in float64.

    Source: MARBLE, arXiv 2605.06507, eq. 5 (unit gradients).

    Shape:
        gram (K, K) -> (K,).
    """
    norms = gram.diagonal().sqrt()
    return method(gram / norms.outer(norms) if normalize else gram).detach().double()


def narrowed(weights: Float[Tensor, "reward"], names: Sequence[str]) -> Float[Tensor, "reward"]:
    """Weights as they multiply losses and gradients, in float32.

    Shape:
        weights (K,) -> (K,).

    Raises:
        ValueError: one of them is not finite in float32.
    """
    found = weights.float()
    if not found.isfinite().all():
        wrong = dict(compress(zip(names, weights.tolist(), strict=True), ~found.isfinite()))
        raise ValueError(f"Weights must be finite in float32 once the norms have been divided out. Found {wrong}.")
    return found


def smooth(
    old: Float[Tensor, "reward"], new: Float[Tensor, "reward"], active: Bool[Tensor, "reward"], decay: float
) -> Float[Tensor, "reward"]:
    r"""$\rho \cdot \text{old} + (1 - \rho) \cdot \text{new}$ for the active, else `old`. NaN in `old`: no past.

    Source: MARBLE, arXiv 2605.06507, eq. 12.

    Shape:
        old, new, active (K,) -> (K,).

    >>> smooth(torch.tensor([1.0, torch.nan, 1.0]), torch.zeros(3), torch.tensor([True, True, False]), 0.75).tolist()
    [0.75, 0.0, 1.0]
    """
    smoothed = torch.where(old.isnan(), new, decay * old + (1 - decay) * new)
    return torch.where(active, smoothed, old)


def merge_rows(
    gradients: Float[Tensor, "reward parameter"],
    coefficients: Float[Tensor, "reward"],
    active: Bool[Tensor, "reward"],
) -> Float[Tensor, "parameter"]:
    r"""$\sum_k c_k g_k$ over the active rewards, row by row: a masked matrix product would copy all gradients.

    Shape:
        gradients (K, P), coefficients (K,), active (K,) -> (P,).
    """
    merged = torch.zeros_like(gradients[0])
    for k in active.nonzero().flatten().tolist():
        merged.add_(gradients[k], alpha=coefficients[k].item())
    return merged
