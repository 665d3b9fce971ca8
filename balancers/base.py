"""What every way of merging rewards shares: when gradients are needed, what becomes of them, what is remembered."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import compress
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from balancers.accumulation import GradientSum
from balancers.gramian import compare, gram_matrix, in_conflict
from balancers.levels import CHECKED
from balancers.merging import active_rows, merge_rows, narrowed, smooth, weigh
from balancers.options import check_names, check_options

log = logging.getLogger(__name__)

CADENCE = (
    "refresh_every",
    "ema_decay",
    "estimate_share",
    "normalize",
    "refresh_alpha",
    "amortize",
    "uniform_after_step",
)
"""Options of every gradient method: with others than its own, a method is not the published one."""


class Balancer(Callback):
    r"""Merges several rewards into one update. A method overrides one of three levels, and nothing else:

    - `merge_rewards`, before advantages exist, or `merge_advantages`; either sets `merged_name` to name its one column;
    - `weights`, from the inner products of the per-reward gradients: $d = \sum_k \bar\alpha_k s_k g_k$. It is given
      float64 on the CPU whatever it is called with; a zero matrix gives uniform weights, and NaN is refused.

    A gradient method is asked every `refresh_every` optimizer steps. Its weights are smoothed reward by reward,
    $\bar\alpha_k \leftarrow \rho \bar\alpha_k + (1 - \rho) \alpha_k$, the first time $\bar\alpha_k = \alpha_k$. With
    `normalize`, $s_k = \operatorname{mean}_j |g_j| / |g_k|$, else 1: from the gradients at hand on a refresh, from norms
    smoothed like the weights in between. (Smoothed ratios would let one faint gradient outweigh all that follow.)

    A reward whose gradient is not finite, or zero (below 3.5e-4 of the largest, what rounding leaves), is left out of the
    solution and keeps its $\bar\alpha_k$ and $s_k$; one never seen has those of `prior` and 1. The others are not shrunk
    to make room for it, so the sum may pass 1 until the next solution: a reward holding all the weight would otherwise
    leave the rest with none on falling silent.

    Between refreshes the loss of a reward is the mean over the samples that it applies to, as on a refresh. The authors'
    code gives a missing advantage the value 0 there and divides by all samples: a reward of a third of the samples then
    weighs a third of what it weighs on a refresh.

    With a loss scaler (16-mixed) a gradient that is not finite has overflowed: the optimizer step is skipped, and nothing
    is taken over from it.

    Source: MARBLE, arXiv 2605.06507, eq. 7 ($s_k$), 12 (smoothing), proposition 1 (reuse between refreshes).

    Args:
        refresh_every: optimizer steps between two solutions, >= 1.
        ema_decay: rho, how much of the old weights a solution keeps, in [0, 1).
        normalize: whether `weights` sees unit gradients, brought back to their mean norm afterwards.
        amortize: what multiplies the raw gradients between refreshes: the weights alone (raw), as the paper does, or the
            weights times $s_k$ of smoothed norms (scaled). `scaled` follows the direction solved for, but is harmful where a
            reward opposes the others: $|g_k|$ is mostly noise, so the one reward with a clean, short gradient gets far too
            long a step. In a trial on the tiny world with such a sixth reward, all five others fell with `scaled` (two seeds
            of two), while all six rose with `raw`.
        refresh_alpha: what merges the gradients on a refresh: the smoothed weights, or those just found (fresh), as the
            authors' code does. The steps in between use the smoothed ones either way.
        estimate_share: share of a refresh step's micro-batches whose gradients are used, rounded up, in [0, 1]; 0 is a
            single micro-batch, as in the authors' code.
        uniform_after_step: optimizer step from which all rewards weigh the same, without gradients. Null: never.
    """

    merged_name: str | None = None
    """Name of the one column that `merge_rewards` or `merge_advantages` leaves; None if columns stay one per reward."""

    def __init__(
        self,
        *,
        refresh_every: int = 1,
        ema_decay: float = 0.0,
        normalize: bool = False,
        amortize: Literal["raw", "scaled"] = "raw",
        refresh_alpha: Literal["smoothed", "fresh"] = "smoothed",
        estimate_share: float = 1.0,
        uniform_after_step: int | None = None,
    ) -> None:
        check_options(refresh_every, ema_decay, amortize, refresh_alpha, estimate_share, uniform_after_step)
        self.refresh_every, self.ema_decay, self.normalize = refresh_every, ema_decay, normalize
        self.amortize, self.refresh_alpha, self.estimate_share = amortize, refresh_alpha, estimate_share
        self.uniform_after_step = uniform_after_step

        self.reward_names: tuple[str, ...] = ()
        self.names: tuple[str, ...] = ()
        self.step = 0
        self.counts = {"refreshes": 0, "update_conflicts": 0, "mean_conflicts": 0}
        self.diagnostics: dict[str, Any] = {}
        self._sum, self._solved = GradientSum(), cast(Tensor | None, None)  # of this optimizer step
        self.any_gradient_overflowed = False
        """Whether the loss scale was too large for a gradient of this optimizer step, which is to be skipped."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for level, check in CHECKED.items():
            if level in vars(cls):
                setattr(cls, level, check(vars(cls)[level]))

    # Names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bind(tuple(cast(Mapping[str, object], pl_module.rewards)))
        self.dry_run()

    def bind(self, reward_names: Sequence[str]) -> None:
        """Learn the rewards' names. Binding again, or after `load_state_dict`, keeps what is remembered.

        Raises:
            ValueError: there is no reward, or the names differ from those bound or loaded before.
        """
        check_names(reward_names, self.reward_names)
        if self.reward_names:
            return
        k = 1 if self.merged_name else len(reward_names)
        self.reward_names = tuple(reward_names)
        self.names = (self.merged_name,) if self.merged_name else self.reward_names
        self.prior = torch.full((k,), 1 / k, dtype=torch.float64)
        self.active = torch.ones(k, dtype=torch.bool)
        self.alpha_smoothed = torch.full_like(self.prior, torch.nan)
        self.norms = torch.full_like(self.prior, torch.nan)
        self.solved_at = torch.zeros(k, dtype=torch.int64)

    def dry_run(self) -> None:
        """Run every level once on made-up input, on a copy, so that a mistake shows before the first rollout.

        Raises:
            ValueError: a level returned something of a wrong shape.
            TypeError: several columns are left and the method does not override `weights`.
        """
        loggers = [vars(self).get(name) for name in ("log", "log_dict")]  # Lightning's: a copy would copy module and trainer
        copy, k = deepcopy(self, {id(logger): logger for logger in loggers}), len(self.reward_names)
        columns = copy.merge_advantages(copy.merge_rewards(torch.eye(k), torch.ones(k, k, dtype=torch.bool)))
        if tuple(columns.shape) != (k, len(self.names)):
            raise ValueError(
                f"{type(self).__name__} must make of (samples, {k}) rewards one column for each of {', '.join(self.names)}. "
                f"Found shape {tuple(columns.shape)} for {k} samples; set `merged_name` where `merge_rewards` or "
                "`merge_advantages` leaves a single column."
            )
        if self.needs_gradients:
            weigh(copy.weights, torch.eye(k, dtype=torch.float64), self.normalize)

    # The three levels

    def merge_rewards(
        self, rewards: Float[Tensor, "sample reward"], applies: Bool[Tensor, "sample reward"]
    ) -> Float[Tensor, "sample column"]:
        """Merge before advantages: (N, K) -> (N, K) or (N, 1). Identity unless overridden."""
        return rewards

    def merge_advantages(self, advantages: Float[Tensor, "sample column"]) -> Float[Tensor, "sample column"]:
        """Merge per-reward advantages, NaN where missing: (N, K) -> (N, K) or (N, 1). Identity unless overridden."""
        return advantages

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        """Weights of the active rewards (`self.active` says which) from their inner products, float64 on the CPU."""
        if len(gram) > 1:
            raise TypeError(f"{type(self).__name__} must override `weights` to merge {len(gram)} gradients.")
        return torch.ones_like(gram[0])

    @property
    def needs_gradients(self) -> bool:
        """Whether the method ever looks at gradients. A single column leaves nothing to weigh."""
        return len(self.names) > 1

    # One optimizer step

    @property
    def uniform(self) -> bool:
        """Whether the last, uniform stage has begun."""
        return self.uniform_after_step is not None and self.step >= self.uniform_after_step

    @property
    def wants_gradients(self) -> bool:
        """Whether the next micro-batch must deliver its per-reward gradients."""
        return self._sum.incomplete

    @property
    def solved(self) -> bool:
        """Whether this optimizer step's weights come from its own gradients."""
        return self._solved is not None

    @property
    def cadence(self) -> dict[str, Any]:
        """The options by which the method runs: how often it solves, on what, and what serves in between.

        Empty where it never looks at gradients.
        """
        return {name: getattr(self, name) for name in CADENCE} if self.needs_gradients else {}

    @property
    def loss_weights(self) -> Float[Tensor, "reward"]:
        """What multiplies each reward's loss in the scalarised loss now: (K,) float32 on the CPU."""
        if self.uniform:
            return torch.full((len(self.names),), 1 / len(self.names))
        if self._solved is not None:
            return self._solved
        return narrowed(self._alpha * self.scale if self.amortize == "scaled" else self._alpha, self.names)

    @property
    def scale(self) -> Float[Tensor, "reward"]:
        """Smoothed s_k, which brings a raw gradient to the mean length; 1 without `normalize` or a past."""
        return (self.norms.nanmean() / self.norms).nan_to_num(1.0) if self.normalize else torch.ones_like(self.prior)

    @property
    def _alpha(self) -> Float[Tensor, "reward"]:
        return torch.where(self.alpha_smoothed.isnan(), self.prior, self.alpha_smoothed)

    def begin_step(self, n_micro_batches: int) -> None:
        """Start an optimizer step of `n_micro_batches` micro-batches; decide whether it is a refresh step."""
        due = self.step % self.refresh_every == 0 or bool(self.alpha_smoothed.isnan().all())
        due = due and self.needs_gradients and not self.uniform
        share = math.ceil(round(self.estimate_share * n_micro_batches, 9))  # 0.7 * 10 is a hair above 7
        self._sum, self._solved = GradientSum(max(share, 1) if due else 0), None
        self.any_gradient_overflowed = False

    def add_gradients(self, gradients: Float[Tensor, "reward parameter"]) -> None:
        """Add one micro-batch's per-reward gradients (K, P), normalised over the optimizer step so that they sum up."""
        self._sum.add(gradients, len(self.names))

    def solve(self, reduce: Callable[[Tensor], Tensor], loss_scaled: bool = False) -> Float[Tensor, "parameter"]:
        """Turn the summed gradients into new coefficients and the merged gradient; free them.

        Args:
            reduce: average of a tensor over the ranks.
            loss_scaled: whether a loss scaler skips optimizer steps. Then a gradient that is not finite sets
                `any_gradient_overflowed`, the merged gradient is zero and all that is remembered stays as it was.

        Raises:
            RuntimeError: not all the gradients asked for have been added.
            ValueError: `weights` returned something of another shape or not finite in float32.
        """
        gradients = reduce(self._sum.take())
        gram = gram_matrix(gradients)
        norms = gram.diagonal().sqrt()
        active = self.active = active_rows(norms)
        self.diagnostics = {"left_out": self._left_out(norms), "gradient_norms": norms, "gram": gram}
        self.any_gradient_overflowed = loss_scaled and not bool(norms.isfinite().all())
        if self.any_gradient_overflowed:
            log.warning("A gradient overflowed at optimizer step %d: skipped, the loss is scaled less.", self.step)
            return torch.zeros_like(gradients[0])
        if not active.any():
            log.warning("No reward has a finite, non-zero gradient at optimizer step %d: nothing merged.", self.step)
            return torch.zeros_like(gradients[0])

        block = gram[active][:, active]
        alpha = torch.zeros_like(self.prior).masked_scatter(active, weigh(self.weights, block, self.normalize))
        ratio = norms[active].mean() / norms if self.normalize else torch.ones_like(norms)
        self.alpha_smoothed = smooth(self.alpha_smoothed, alpha, active, self.ema_decay)
        self.norms = smooth(self.norms, norms, active, self.ema_decay)
        applied = alpha if self.refresh_alpha == "fresh" else self._alpha
        self._solved = narrowed(torch.where(active, applied * ratio, self._alpha * self.scale), self.names)
        self.solved_at[active] = self.step

        agreement = compare(block, self.loss_weights[active])
        self.counts["refreshes"] += 1
        self.counts["update_conflicts"] += in_conflict(agreement["update/cos_min"])
        self.counts["mean_conflicts"] += in_conflict(agreement["mean/cos_min"])
        age = self.step - self.solved_at
        self.diagnostics |= {"alpha": alpha, "alpha_smoothed": self._alpha, "alpha_age": age, **agreement}
        return merge_rows(gradients, self.loss_weights, active)

    def _left_out(self, norms: Float[Tensor, "reward"]) -> dict[str, str]:
        """Rewards that are not active, and why."""
        reasons = {name: "zero" if norm.isfinite() else "not finite" for name, norm in zip(self.names, norms, strict=True)}
        left_out = {name: reasons[name] for name in compress(self.names, ~self.active)}
        for name, reason in left_out.items():
            level = logging.WARNING if reason == "not finite" else logging.DEBUG
            log.log(level, "The gradient of %s is %s at optimizer step %d: left out.", name, reason, self.step)
        return left_out

    def end_step(self) -> None:
        """End an optimizer step, after the optimizer has stepped; a skipped one is repeated."""
        self.step += not self.any_gradient_overflowed
        self._sum, self._solved = GradientSum(), None

    # Checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell where a run goes on from what another balancer has trained."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            ours = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
            theirs = ", ".join(sorted(set(checkpoint["callbacks"]) - ours)) or "another balancer"
            rank_zero_warn(f"{trainer.ckpt_path} was trained with {theirs}; this run goes on with {self.state_key}.")

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, between two optimizer steps; NaN where a reward has never been active."""
        if not self.names:
            return {}
        state = {name: getattr(self, name).clone() for name in ("alpha_smoothed", "norms", "solved_at")}
        return {"reward_names": list(self.reward_names), "step": self.step, "counts": dict(self.counts), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a `state_dict`, before or after `bind`. Raises a ValueError if its rewards are not the run's."""
        self.bind(state_dict["reward_names"])
        self.step, self.counts = state_dict["step"], dict(state_dict["counts"])
        for name in ("alpha_smoothed", "norms", "solved_at"):
            setattr(self, name, state_dict[name].clone())
