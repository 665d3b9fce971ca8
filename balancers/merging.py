"""From per-reward gradients to one update, as pure functions: active rewards, smoothing, merging."""

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def active_rows(norms: Float[Tensor, " reward"]) -> Bool[Tensor, " reward"]:
    """Which gradients are merged: those that are finite and longer than the rounding error of a sum of float32 terms.

    A zero gradient would make the zero vector the min-norm point, and the update would be zero for every reward. A reward
    that scores all samples equally has a gradient of rounding errors only, which must not be scaled to unit length.

    Shape:
        norms (K,) -> (K,).

    >>> active_rows(torch.tensor([2.0, 0.0, torch.nan])).tolist()
    [True, False, False]
    """
    longest = norms.nan_to_num(nan=0.0, posinf=0.0).max()
    return norms.isfinite() & (norms > torch.finfo(torch.float32).eps ** 0.5 * longest)


def call_weights(
    method: Callable[[Tensor], Tensor], gram: Float[Tensor, "active active"], normalize: bool
) -> Float[Tensor, " active"]:
    r"""A method's `weights` of $G_{jk}$, or with `normalize` of $G_{jk} / (|g_j| |g_k|)$, in float64.

    Shape:
        gram (K, K) -> (K,).

    Source: MARBLE, arXiv 2605.06507, eq. 5 (unit gradients).
    """
    norms = gram.diagonal().sqrt()
    return method(gram / norms.outer(norms) if normalize else gram).detach().double()


def as_float32(weights: Float[Tensor, " reward"], names: Sequence[str]) -> Float[Tensor, " reward"]:
    """Weights in float32, the precision in which they multiply losses and gradients.

    Shape:
        weights (K,) -> (K,).

    Raises:
        ValueError: A weight is not finite in float32.
    """
    narrow = weights.float()
    if not narrow.isfinite().all():
        wrong = dict(compress(zip(names, weights.tolist(), strict=True), ~narrow.isfinite()))
        raise ValueError(f"Weights must be finite in float32 after division by the norms. Found {wrong}.")
    return narrow


def smooth(
    old: Float[Tensor, " reward"], new: Float[Tensor, " reward"], active: Bool[Tensor, " reward"], decay: float
) -> Float[Tensor, " reward"]:
    r"""$\rho \cdot \text{old} + (1 - \rho) \cdot \text{new}$ for active rewards, `old` for others; `new` if `old` is NaN.

    Shape:
        old, new, active (K,) -> (K,).

    Source: MARBLE, arXiv 2605.06507, eq. 12.

    >>> smooth(torch.tensor([1.0, torch.nan, 1.0]), torch.zeros(3), torch.tensor([True, True, False]), 0.75).tolist()
    [0.75, 0.0, 1.0]
    """
    smoothed = torch.where(old.isnan(), new, decay * old + (1 - decay) * new)
    return torch.where(active, smoothed, old)


def merge_rows(
    rows: Float[Tensor, "row parameter"],
    coefficients: Float[Tensor, " reward"],
    active: Bool[Tensor, " reward"],
) -> Float[Tensor, " parameter"]:
    r"""$\sum_k c_k g_k$ over the active rewards, row by row, since a masked matrix product would copy all gradients.

    Shape:
        rows (K, P), or (2 K, P) with the first parts of all gradients, then their second ones; coefficients (K,),
        active (K,) -> (P,).
    """
    merged = torch.zeros_like(rows[0])
    for part in rows.split(len(active)):
        for k in active.nonzero().flatten().tolist():
            merged.add_(part[k], alpha=coefficients[k].item())
    return merged
