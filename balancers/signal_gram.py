r"""The Gram matrix that a gradient method solves on, averaged over refreshes, with or without the noise that rewards share.

Gradients of one step are a signal and noise, $g_k = \mu_k + \varepsilon_k$. Rewards share images, and so the noise: the
inner products of one step converge to $\mu_j \cdot \mu_k + \operatorname{E}[\varepsilon_j \cdot \varepsilon_k]$. Halves A
and B share no prompt, so their noise is independent, and $S_{jk} = \tfrac12 (g_j^A \cdot g_k^B + g_k^A \cdot g_j^B)$ is
unbiased for $\mu_j \cdot \mu_k$. One refresh is a noisy estimate. The mean over refreshes converges, and their spread tells
its error.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.gramian import gram_matrix
from balancers.options import GradientOptions


class Products(NamedTuple):
    r"""Inner products of one refresh: `own` (K, K), $\langle g_j, g_k \rangle$; `cross`, $\langle g_j^A, g_k^B \rangle$.

    `cross` is NaN where a reward is absent from its half, and everywhere without halves.
    """

    own: Float[Tensor, "reward reward"]
    cross: Float[Tensor, "reward reward"]

    @property
    def split(self) -> Float[Tensor, "reward reward"]:
        r"""$S$, the symmetric part of `cross`: unbiased for $\mu_j \cdot \mu_k$."""
        return (self.cross + self.cross.T) / 2

    def where(self, rewards: Bool[Tensor, " reward"]) -> "Products":
        """The same products, NaN for other rewards than these."""
        outside = ~(rewards[:, None] & rewards)
        return Products(self.own.masked_fill(outside, torch.nan), self.cross.masked_fill(outside, torch.nan))


def products_of(gradients: Tensor, samples: Float[Tensor, "half reward"] | None) -> Products:
    """Inner products of the gradients, in float64 on the CPU.

    Args:
        gradients: One row per reward, or two parts of it, from the prompts of each half.
        samples: Number of samples of each half that each reward applies to, up to a factor; None without halves.

    Shape:
        gradients (K, P), or (2, K, P) with samples (2, K).
    """
    if samples is None:
        own = gram_matrix(gradients)
        return Products(own, torch.full_like(own, torch.nan))
    k = gradients.shape[1]
    of_parts = gram_matrix(gradients.flatten(0, 1)).reshape(2, k, 2, k)
    # The parts add up to g_k, divided by all its samples. A half's own mean is its part, divided by its share of them.
    samples = samples.cpu().double()  # in this order, since Apple's GPUs have no float64
    first, second = samples / samples.sum(0)
    return Products(of_parts.sum((0, 2)), (of_parts[0, :, 1] / first.outer(second)).nan_to_num(*[torch.nan] * 3))


class RunningMean:
    r"""Mean of K x K matrices over refreshes with weights $\rho^\text{age}$; entries that are not finite do not count.

    Args:
        rewards: K.
        decay: rho, in [0, 1]. 0 keeps the last value only.
    """

    def __init__(self, rewards: int, decay: float) -> None:
        self.decay = decay
        self.mean = torch.full((rewards, rewards), torch.nan, dtype=torch.float64)
        self.weight, self.squares = torch.zeros(2, rewards, rewards, dtype=torch.float64)
        """Sum of the weights, and of their squares, which together give the variance of the mean."""

    def update(self, values: Float[Tensor, "reward reward"]) -> None:
        """Add a matrix."""
        known = values.isfinite()
        self.weight = torch.where(known, self.decay * self.weight + 1, self.weight)
        self.squares = torch.where(known, self.decay**2 * self.squares + 1, self.squares)
        mean = (1 - 1 / self.weight) * self.mean.nan_to_num() + values / self.weight
        self.mean = torch.where(known, mean, self.mean)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the state."""
        return {name: getattr(self, name).clone() for name in ("mean", "weight", "squares")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value.clone())


class SignalGram:
    r"""Estimates the Gram matrix to solve on from the products of each refresh.

    With `gram: own` it is the mean of the gradients' Gram matrices, $\bar G$. With `gram: split` it is the mean of the
    products of halves, $\bar S$, shrunk towards the former, $\hat S = (1 - \lambda) \bar S + \lambda \bar G$. With
    $R_{jk} = \bar S_{jk} / \sqrt{\bar G_{jj} \bar G_{kk}}$, $\lambda$ is the share of noise in it,
    $\lambda = \sum_{j \neq k} \operatorname{Var} R_{jk} / \sum_{j \neq k} R_{jk}^2$, at most 1. The variance of the mean
    follows from the spread of S over refreshes, as if these were independent; a single one tells none, and $\lambda = 1$.
    Without a measurable signal the estimate is thus near the gradients' own Gram matrix. Products that were never
    estimated, since a reward was absent from a half, are the gradients' own.

    Args:
        rewards: K.
        options: `gram`, `gram_decay`, `gram_shrinkage` and `signal_floor`.

    Source: in the spirit of Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004,
    whose intensity has the squared distance to the target as denominator.
    """

    def __init__(self, rewards: int, options: GradientOptions) -> None:
        self.options = options
        self.own, self.split, self.squared = (RunningMean(rewards, options.gram_decay) for _ in range(3))

    def update(self, products: Products) -> None:
        """Add a refresh. Entries that are not finite are not estimated, such as those of rewards without a gradient."""
        self.own.update(products.own)
        self.split.update(products.split)
        self.squared.update(products.split.square())

    @property
    def variance(self) -> Float[Tensor, "reward reward"]:
        """Variance of the mean of S; NaN with fewer than two refreshes."""
        share = self.split.squares / self.split.weight.square()  # 1 / n for n equal weights
        spread = self.squared.mean - self.split.mean.square()
        return torch.where(share < 1 - 1e-9, spread * share / (1 - share), torch.nan)

    @property
    def shrinkage(self) -> float:
        """Lambda, the share of the gradients' own Gram matrix in the estimate."""
        if self.options.gram == "own":
            return 1.0
        if not self.options.gram_shrinkage:
            return 0.0
        norms, variance = self.own.mean.diagonal().sqrt(), self.variance
        scale, used = norms.outer(norms), variance.isfinite() & ~torch.eye(len(norms), dtype=torch.bool)
        noise = (variance / scale.square())[used].sum()
        energy = (self.split.mean / scale).square()[used].sum()
        return float((noise / energy).clamp(0, 1)) if energy > 0 else 1.0

    def estimate(self) -> Float[Tensor, "reward reward"]:
        """The Gram matrix, positive semi-definite; NaN for a reward that never had a gradient.

        With `gram: split` a reward's signal is at least `signal_floor` times its gradient's norm long, so that a reward
        without a measurable signal gets no infinite step.
        """
        own = self.own.mean
        if self.options.gram == "own" and not self.options.gram_decay:
            return own  # of this refresh, as in the paper
        gram, floor = own, 1.0
        if self.options.gram == "split":
            shrinkage, floor = self.shrinkage, self.options.signal_floor
            gram = torch.where(self.split.mean.isfinite(), (1 - shrinkage) * self.split.mean + shrinkage * own, own)
        lengths = torch.maximum(gram.diagonal(), floor**2 * own.diagonal()).sqrt()
        known = lengths.isfinite()
        # 0 for two rewards that never had gradients at the same refresh
        unit = (gram / lengths.outer(lengths))[known][:, known].nan_to_num(0.0).fill_diagonal_(1.0)
        estimate = torch.full_like(gram, torch.nan)
        estimate[known.outer(known)] = nearest_psd(unit).flatten()
        return estimate * lengths.outer(lengths)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the state."""
        return {name: mean.state_dict() for name, mean in self._means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`."""
        for name, mean in self._means.items():
            mean.load_state_dict(state[name])

    @property
    def _means(self) -> dict[str, RunningMean]:
        return {"own": self.own, "split": self.split, "squared": self.squared}


def nearest_psd(gram: Float[Tensor, "reward reward"]) -> Float[Tensor, "reward reward"]:
    """The nearest positive semi-definite matrix, since an estimated Gram matrix need not be one.

    >>> nearest_psd(torch.tensor([[1.0, 0.0], [0.0, -1.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return vectors @ values.clamp(min=0).diag() @ vectors.T
