r"""The Gram matrix of the rewards' signal, from gradients of two disjoint halves of a step's prompts.

Gradients of one step are a signal and noise, $g_k = \mu_k + \varepsilon_k$. Rewards share images, and so the noise: the
inner products of one step converge to $\mu_j \cdot \mu_k + \operatorname{E}[\varepsilon_j \cdot \varepsilon_k]$. Halves A
and B share no prompt, so their noise is independent, and $S_{jk} = \tfrac12 (g_j^A \cdot g_k^B + g_k^A \cdot g_j^B)$ is
unbiased for $\mu_j \cdot \mu_k$. One refresh is a noisy estimate. The mean over refreshes converges, and the difference of
the two terms tells its error.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Signal(NamedTuple):
    """An estimate of the signal: its Gram matrix `gram` (K, K), and the length of each reward's signal, `lengths` (K,).

    `lengths` are at least the floor's share of the gradients' norms, so that a reward without signal gets no infinite step.
    A length is 0 for a reward that was never in both halves: leave it out of a solution.
    `shrinkage` in [0, 1] is the share of the gradients' own Gram matrix in `gram`.
    """

    gram: Float[Tensor, "reward reward"]
    lengths: Float[Tensor, " reward"]
    shrinkage: float


class SignalGram:
    r"""Averages the products of halves over refreshes, $\bar S \leftarrow$ a mean with weights $\rho^{t - i}$ of refresh i.

    The average is shrunk towards that of the gradients' own Gram matrices, $\hat S = (1 - \lambda) \bar S + \lambda \bar G$.
    With $R_{jk} = \bar S_{jk} / \sqrt{\bar G_{jj} \bar G_{kk}}$, $\lambda$ is the share of noise in it,
    $\lambda = \sum_{j \neq k} \operatorname{Var} R_{jk} / \sum_{j \neq k} R_{jk}^2$, at most 1. The variance of one refresh
    is estimated from $D_{jk} = \tfrac12 (g_j^A \cdot g_k^B - g_k^A \cdot g_j^B)$, which has mean 0 and the variance of
    $S_{jk}$. Without a measurable signal the estimate is thus the gradients' own Gram matrix.

    Args:
        rewards: K.
        decay: rho, in [0, 1). 0 uses the last refresh only.

    Source: the shrinkage follows Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
    2004.
    """

    def __init__(self, rewards: int, decay: float) -> None:
        self.decay = decay
        self.own, self.signal, self.variance, self.weight, self.squares = torch.zeros(
            5, rewards, rewards, dtype=torch.float64
        )

    def update(self, own: Float[Tensor, "reward reward"], cross: Float[Tensor, "reward reward"]) -> None:
        r"""Add a refresh.

        Args:
            own: $\langle g_j, g_k \rangle$ of the gradients of all prompts.
            cross: $\langle g_j^A, g_k^B \rangle$ of the halves. Entries that are not finite are not estimated, such as those
                of a reward that is absent from a half.

        Shape:
            own, cross (K, K).
        """
        pair = (cross + cross.T).isfinite() & own.isfinite()
        # means with weights: the sum of weights and of their squares give the variance of the mean
        self.weight = torch.where(pair, self.decay * self.weight + 1, self.weight)
        self.squares = torch.where(pair, self.decay**2 * self.squares + 1, self.squares)
        new = {"own": own, "signal": (cross + cross.T) / 2, "variance": ((cross - cross.T) / 2).square()}
        for name, values in new.items():
            mean = getattr(self, name)
            setattr(self, name, torch.where(pair, mean + (values - mean) / self.weight, mean))

    def estimate(self, floor: float) -> Signal:
        """The shrunk Gram matrix, and the signals' lengths.

        Args:
            floor: Smallest length of a signal relative to the norm of the gradient, in (0, 1].
        """
        norms = self.own.diagonal().sqrt()
        scale = norms.outer(norms)
        apart = ~torch.eye(len(norms), dtype=torch.bool)
        noise = (self.variance / scale.square() * self.squares / self.weight.square())[apart].nansum()
        energy = (self.signal / scale).square()[apart].nansum()
        shrinkage = float((noise / energy).clamp(0, 1)) if energy > 0 else 1.0
        gram = (1 - shrinkage) * self.signal + shrinkage * self.own
        lengths = torch.maximum(gram.diagonal(), (floor * norms).square()).sqrt()
        return Signal(gram, lengths, shrinkage)


def nearest_psd(gram: Float[Tensor, "reward reward"]) -> Float[Tensor, "reward reward"]:
    """The nearest positive semi-definite matrix, since an estimated Gram matrix need not be one.

    >>> nearest_psd(torch.tensor([[1.0, 0.0], [0.0, -1.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return vectors @ values.clamp(min=0).diag() @ vectors.T
