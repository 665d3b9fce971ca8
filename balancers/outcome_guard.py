"""Constant weights, raised for rewards that have fallen: a guard that reacts to scores instead of gradients."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from balancers.fixed_weights import FixedWeights
from balancers.spread import spread, squared_deviations


class OutcomeGuard(FixedWeights):
    r"""Merge as FixedWeights with weights $\propto \lambda_k w_k$; $\lambda_k$ grows while a reward is below its start.

    The start $S_k$ is the mean score of the first `window` rounds, $M_k$ that of the last ones, and $\sigma_k$ the standard
    deviation within prompts over all rounds. After each round

    $$\lambda_k \leftarrow \min\Big(\max\Big(\lambda_k \exp\big(\eta\, (S_k - M_k) / \sigma_k\big),\, 1\Big),
      \lambda_\max\Big)$$

    So the multiplier of a reward below its start rises by about a share $\eta$ a round for each $\sigma_k$ that it has
    fallen, and that of a reward above its start decays to 1 at the same rate. It is multiplicative (exponentiated-gradient)
    dual ascent on the constraints $M_k \ge S_k$. Gradients of one step can be mostly noise, so a direction that opposes none
    of them does not keep rewards from falling; scores are what must not fall.

    A round in which a reward applies to no image does not count for it. Its multiplier is 1 until `window` rounds count. The
    means are over training images with the prompts of each round, so a small `window` reacts to the draw of prompts.

    Args:
        rate: eta, growth of a multiplier a round for a fall of one standard deviation, > 0.
        window: Rounds of each mean, >= 1.
        max_multiplier: Largest multiplier, > 1.
        **kwargs: See `FixedWeights`. With `normalize` the weights are those of the last refresh.

    Raises:
        ValueError: An option is out of its range.

    Source: the update of Kivinen and Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear Predictors", 1997;
    multipliers of rewards as in Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF", 2024.
    """

    def __init__(self, *, rate: float = 0.2, window: int = 5, max_multiplier: float = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"`rate` must be finite and > 0. Found {rate}. Use FixedWeights for constant weights.")
        if window < 1:
            raise ValueError(f"`window` must be >= 1 rounds. Found {window}.")
        if not (math.isfinite(max_multiplier) and max_multiplier > 1):
            raise ValueError(f"`max_multiplier` must be finite and > 1. Found {max_multiplier}.")
        self.rate, self.window, self.max_multiplier = rate, window, max_multiplier

    @property
    def multipliers(self) -> dict[str, float]:
        """Lambda of each reward, >= 1."""
        return {name: self.memory.get("multipliers", {}).get(name, 1.0) for name in self.reward_names}

    def initial_weights(self) -> Float[Tensor, " reward"]:
        weights = super().initial_weights() * torch.tensor(list(self.multipliers.values()), dtype=torch.float64)
        return weights / weights.sum()

    def begin_round(self, scores: Float[Tensor, "sample reward"], prompts: Int[Tensor, " sample"]) -> dict[str, float]:
        """Update the multipliers. Returns them."""
        scores = scores.cpu().double()
        totals = self.memory["totals"] = self.memory.get("totals", 0) + squared_deviations(scores, prompts)
        for name, column, std in zip(self.reward_names, scores.T, spread(totals).tolist(), strict=True):
            scored = column[column.isfinite()]
            if len(scored):
                self._observe(name, scored.mean().item(), std)
        self.smoothed.initial = self.initial_weights()
        return {f"multiplier/{name}": value for name, value in self.multipliers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.smoothed.initial = self.initial_weights()

    def _observe(self, name: str, mean: float, std: float) -> None:
        """Update one reward's multiplier by its mean score in this round and its standard deviation within prompts."""
        starts, recent = self.memory.setdefault("starts", {}), self.memory.setdefault("recent", {})
        recent[name] = [*recent.get(name, []), mean][-self.window :]
        if len(recent[name]) < self.window:
            return
        average = sum(recent[name]) / self.window
        fall = starts.setdefault(name, average) - average
        if std > 0:  # without a spread, no two images of a prompt have ever differed
            raised = math.log(self.multipliers[name]) + self.rate * fall / std
            largest = math.log(self.max_multiplier)
            self.memory.setdefault("multipliers", {})[name] = math.exp(min(max(raised, 0.0), largest))
