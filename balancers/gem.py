"""GEM: the direction nearest to a primary reward's gradient that opposes no other reward."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from balancers.base import Balancer
from balancers.gramian import root
from balancers.per_reward_options import check_known


class GEM(Balancer):
    r"""Improve a primary reward, and let no other reward's first-order change be negative.

    $$d = \arg\min_d \|d - g_p\|^2 \quad \text{s.t.} \quad \langle d, g_k \rangle \ge 0 \ \text{for } k \ne p$$

    The dual gives it from inner products: $d = g_p + \sum_{k \ne p} v_k g_k$ with the $v \ge 0$ that minimises $\|d\|^2$.
    Where no other reward opposes $g_p$, $d = g_p$: the other rewards are protected and not improved for their own sake. The
    update is zero if every direction that improves the primary reward harms another, such as where $g_k = -g_p$, and if the
    primary reward has no gradient.

    The source protects a current task's memory of earlier ones; here the task to learn is the primary reward.

    Args:
        primary: Name of the reward to improve.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. 8 (program) and 11
    (dual), without its margin.
    """

    def __init__(self, *, primary: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.primary = primary

    def bind(self, reward_names: Sequence[str]) -> None:
        check_known([self.primary], reward_names, "primary")
        super().bind(reward_names)

    def initial_weights(self) -> Float[Tensor, " reward"]:
        return torch.tensor([float(name == self.primary) for name in self.names], dtype=torch.float64)

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        primary = self.initial_weights()[self.active].bool()
        return nearest_without_conflict(gram, int(primary.nonzero())) if primary.any() else torch.zeros_like(gram[0])


def nearest_without_conflict(gram: Float[Tensor, "reward reward"], primary: int) -> Float[Tensor, " reward"]:
    r"""Weights of the vector nearest to gradient `primary` whose inner products with the others are not negative.

    The dual is a least-squares problem over v >= 0, which SciPy solves by active sets: exactly, also where gradients are
    dependent. Unit gradients allow the same directions, and keep its numbers near 1.

    Shape:
        gram (K, K) -> (K,), float64; 1 for `primary`, >= 0 for the others.

    >>> nearest_without_conflict(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]).double(), 0).round(decimals=6).tolist()
    [1.0, 0.5]
    """
    norms = gram.diagonal().sqrt()
    lengths = torch.where(norms > 0, norms, 1)
    rows = root(gram / lengths.outer(lengths))
    others = torch.arange(len(gram)) != primary
    v, _ = nnls(rows[others].T.numpy(), -rows[primary].numpy())
    weights = torch.ones_like(gram[0])
    weights[others] = torch.from_numpy(v) * norms[primary] / lengths[others]
    return weights
