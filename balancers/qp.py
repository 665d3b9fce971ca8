"""The min-norm point of a convex hull from inner products alone, by a small differentiable quadratic program."""

import torch
from jaxtyping import Float
from qpth.qp import QPFunction
from torch import Tensor

RIDGE = 1e-8
"""Added to the diagonal of the Gram matrix, scaled to mean diagonal 1, so that the optimal point is unique."""


def check_floor(floor: float, n_rewards: int) -> None:
    """Check that `n_rewards` weights of at least `floor` can sum to 1.

    Raises:
        ValueError: `floor` is negative or not a number, or `floor * n_rewards` is above 1.
    """
    if not 0 <= floor * n_rewards <= 1 + 1e-12:
        raise ValueError(
            f"`floor` must be >= 0 and at most 1 / {n_rewards} for {n_rewards} rewards. Found {floor}. Lower `floor`."
        )


def min_norm_weights(gram: Float[Tensor, "*batch reward reward"], floor: float = 0.0) -> Float[Tensor, "*batch reward"]:
    r"""Weights of the shortest vector in the convex hull of K gradients.

    $$\alpha^* = \arg\min_\alpha \tfrac12 \alpha^\top G \alpha \quad \text{s.t.} \quad
      \textstyle\sum_k \alpha_k = 1, \ \alpha_k \ge \text{floor}, \qquad G_{jk} = \langle g_j, g_k \rangle$$

    With `floor = 0` the direction $\sum_k \alpha^*_k g_k$ has a non-negative inner product with every $g_k$. The
    program is always solved in float64, after dividing `gram` by its mean diagonal and adding a ridge of 1e-8, so the
    result does not depend on the scale of `gram`. The objective exceeds the minimum by at most about 1e-8 of that mean
    diagonal, and by far less when the gradients have similar norms. Among several optimal points, the most even one is
    returned. Differentiable in `gram`.

    Args:
        gram: Inner products of the gradients, symmetric positive semi-definite.
        floor: Smallest weight of a reward, in [0, 1/K].

    Shape:
        gram (..., K, K) -> weights (..., K), dtype of `gram`.

    Raises:
        ValueError: `gram` is not square or not finite, or `floor` is out of range.

    Source: MARBLE, arXiv 2605.06507, eq. 6; the min-norm point is MGDA's (Désidéri, 2012).

    >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    tensor([0.8000, 0.2000])
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"`gram` must have shape (..., K, K) with K >= 1. Found {tuple(gram.shape)}.")
    if not gram.isfinite().all():
        raise ValueError("`gram` must be finite. Found NaN or infinity. Leave such gradients out before solving.")
    k = gram.shape[-1]
    check_floor(floor, k)
    if k == 1 or gram.numel() == 0:
        return torch.ones_like(gram[..., 0])

    # alpha = floor + free * z with z on the simplex: feasible even where floor * K = 1 and only one point is allowed.
    free = max(1 - k * floor, 0.0)
    scaled = gram.double().reshape(-1, k, k)
    scaled = (scaled + scaled.mT) / 2
    size = scaled.diagonal(dim1=-2, dim2=-1).mean(-1)
    scaled = scaled / torch.where(size > 0, size, 1)[:, None, None]
    z = simplex_minimum(free * scaled, floor * scaled.sum(-1))
    return (floor + free * z).reshape(gram.shape[:-1]).to(gram.dtype)


def simplex_minimum(
    quadratic: Float[Tensor, "*batch reward reward"], linear: Float[Tensor, "*batch reward"]
) -> Float[Tensor, "*batch reward"]:
    r"""The point of the simplex that minimises $\tfrac12 z^\top Q z + p^\top z$, differentiable in both; Q of size about 1.

    Shape:
        quadratic (..., K, K), linear (..., K) -> (..., K), float64.
    """
    k = quadratic.shape[-1]
    eye = torch.eye(k, dtype=torch.float64, device=quadratic.device)
    # qpth's defaults (20 iterations, 1e-12) leave flat directions off by 1e-3; these settle them to 1e-8.
    solver = QPFunction(verbose=-1, eps=1e-15, notImprovedLim=6, maxIter=40)
    z = solver(
        quadratic.reshape(-1, k, k) + RIDGE * eye, linear.reshape(-1, k),
        -eye, eye.new_zeros(k), eye.new_ones(1, k), eye.new_ones(1),
    )  # fmt: skip
    z = z.clamp(min=0)
    return (z / z.sum(-1, keepdim=True)).reshape(linear.shape)


def sensitivity(gram: Float[Tensor, "reward reward"], floor: float = 0.0) -> Float[Tensor, " reward"]:
    r"""Sensitivity of the min-norm weights to the Gram matrix: $\| \partial \alpha^*_k / \partial G \|$ of each weight.

    It is large where a small change of the gradients would change the weight a lot, and 0 where the weight is at its
    floor. It is computed by autograd through the quadratic program.

    Shape:
        gram (K, K) -> (K,).
    """
    if len(gram) == 1:
        return torch.zeros_like(gram[0], dtype=torch.float64)
    copies = gram.detach().double().repeat(len(gram), 1, 1).requires_grad_()  # one per weight, solved as one batch
    with torch.enable_grad():
        diagonal = min_norm_weights(copies, floor).diagonal().sum()  # weight k of copy k
    (rows,) = torch.autograd.grad(diagonal, copies)
    return (rows + rows.mT).norm(dim=(1, 2)) / 2
