"""CAGrad: the direction near the mean gradient that maximises the smallest inner product with a gradient."""

import math
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from balancers.base import Balancer
from balancers.qp import simplex_minimum


class CAGrad(Balancer):
    r"""Maximise the smallest inner product with a gradient within a ball around the mean gradient $g_0$.

    $$d = \arg\max_{\|d - g_0\| \le c \|g_0\|} \min_k \langle g_k, d \rangle
        = g_0 + \frac{c \|g_0\|}{\|g_{w^*}\|}\, g_{w^*}, \qquad
      w^* = \arg\min_{w \in \Delta} \langle g_w, g_0 \rangle + c \|g_0\| \|g_w\|, \quad g_w = \sum_k w_k g_k$$

    Args:
        c: Radius of the ball as a share of the mean gradient's length, >= 0. 0 is the mean gradient.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, eq. 4 and algorithm 1.
    """

    def __init__(self, *, c: float = 0.4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"`c` must be finite and >= 0. Found {c}. The published runs use 0.4.")
        self.c = c

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        return conflict_averse(gram, self.c)


def conflict_averse(gram: Float[Tensor, "reward reward"], c: float) -> Float[Tensor, " reward"]:
    r"""CAGrad's weights.

    The objective contains a norm. Since $\|g_w\| = \min_{s > 0} (\|g_w\|^2 / s + s) / 2$, the problem is a quadratic
    program for each s. The optimal s equals $\|g_w\|$ at the solution of its program: the root of a decreasing function.

    Shape:
        gram (K, K) -> (K,).
    """
    size = float(gram.diagonal().mean())
    unit, mean = gram / size, torch.full_like(gram[0], 1 / len(gram))
    radius = c * length(mean, unit)
    if radius < TINY:
        return mean

    def solve(s: float) -> Tensor:
        """Solution of the program for one s; the division keeps its numbers near 1."""
        larger = max(radius / s, 1.0)
        return simplex_minimum(unit * (radius / s / larger), unit @ mean / larger)

    if length(solve(TINY), unit) <= TINY:
        return mean  # zero lies in the hull: no direction improves all rewards, and a zero update would improve none
    longest = float(unit.diagonal().max().sqrt())
    s = brentq(lambda s: length(solve(s), unit) - s, TINY, longest * (1 + 1e-6), xtol=1e-14, rtol=1e-12)
    w = solve(s)
    return mean + radius / length(w, unit) * w


def length(w: Float[Tensor, " reward"], gram: Float[Tensor, "reward reward"]) -> float:
    """Length of the combination w of the gradients."""
    return float((w @ gram @ w).clamp(min=0).sqrt())


TINY = 1e-4
"""Lengths up to this count as zero, relative to the gradients' root mean square length."""
