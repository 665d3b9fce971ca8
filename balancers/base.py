"""The base class of all balancers: a Lightning callback around a method that turns inner products into weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import compress
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from balancers.accumulation import GradientSum
from balancers.gramian import compare, cosines, in_conflict
from balancers.levels import LEVEL_CHECKS, check_names, dry_run
from balancers.merging import active_rows, as_float32, call_weights, merge_rows
from balancers.options import GradientOptions
from balancers.signal_gram import Products, SignalGram, products_of
from balancers.smoothed_weights import SmoothedWeights

log = logging.getLogger(__name__)


class Balancer(Callback):
    r"""Merges several rewards into one update. A method overrides one of three levels, and nothing else:

    - `merge_rewards`, before advantages are computed, or `merge_advantages`; either sets `merged_name` to name its column;
    - `weights`, from the inner products of the per-reward gradients: $d = \sum_k \bar\alpha_k s_k g_k$. It receives
      float64 on the CPU, for any input of the caller; a zero matrix gives uniform weights, and NaN raises a ValueError.

    A gradient method computes weights every `refresh_every` optimizer steps. The weights are smoothed for each reward,
    $\bar\alpha_k \leftarrow \rho \bar\alpha_k + (1 - \rho) \alpha_k$; the first time, $\bar\alpha_k = \alpha_k$. With
    `normalize`, $s_k = \operatorname{mean}_j |g_j| / |g_k|$ on a refresh, otherwise $s_k = 1$; $|g_k|^2$ is the diagonal of
    the matrix that was solved on, so with `gram: split` it is the length of the signal. Between refreshes the weights
    multiply raw gradients, $s_k = 1$, as in the paper. (If $s_k$ multiplied them there too, the one reward with a clean,
    short gradient would get far too long a step, since $|g_k|$ is mostly noise.)

    A reward is inactive if its gradient is not finite or is zero (below 3.5e-4 of the largest, the level of rounding
    errors). It is left out of the solution and keeps its $\bar\alpha_k$, with $s_k = 1$; a reward that was never active has
    its weight from `initial_weights`. The weights of the active rewards are not scaled down for it, so the sum may exceed 1
    until the next solution. Otherwise, if a reward with all the weight became inactive, the others would have none.

    Between refreshes the loss of a reward is the mean over the samples that it applies to, as on a refresh. The authors'
    code sets a missing advantage to 0 there and divides by all samples, so a reward that applies to a third of the samples
    then has a third of the weight that it has on a refresh.

    With a loss scaler (16-mixed) a step whose reward gradients overflow is skipped and not counted; the state is kept.

    Args:
        **options: See `GradientOptions`.

    Source: MARBLE, arXiv 2605.06507, eq. 7 ($s_k$), 12 (smoothing), proposition 1 (reuse between refreshes).
    """

    merged_name: str | None = None
    """Name of the one column that `merge_rewards` or `merge_advantages` returns; None for one column per reward."""

    def __init__(self, **options: Any) -> None:
        self.options = GradientOptions(**options)
        self.reward_names: tuple[str, ...] = ()
        self.names: tuple[str, ...] = ()
        self.step = 0
        self.counts = {"refreshes": 0, "update_conflicts": 0, "mean_conflicts": 0}
        self.diagnostics: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        """What the method keeps between rounds and refreshes, in checkpoints too: tensors, numbers, texts, lists, dicts."""
        self._sum, self._solved = GradientSum(), cast(Tensor | None, None)  # of the current optimizer step
        self.any_gradient_overflowed = False
        """Whether a gradient of this optimizer step overflowed; the step is then skipped."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for level, check in LEVEL_CHECKS.items():
            if level in vars(cls):
                setattr(cls, level, check(vars(cls)[level]))

    def begin_round(self, scores: Float[Tensor, "sample reward"], prompts: Int[Tensor, " sample"]) -> dict[str, float]:
        """Use the scores of all ranks (NaN: none) before they are merged, once a round. Returns figures to log; none here.

        Shape:
            scores (N, K), prompts (N,), the index of each sample's prompt from 0.
        """
        return {}

    # The three levels, of which a method overrides one

    def merge_rewards(
        self, rewards: Float[Tensor, "sample reward"], applies: Bool[Tensor, "sample reward"]
    ) -> Float[Tensor, "sample column"]:
        """Merge rewards before advantages are computed: (N, K) -> (N, K) or (N, 1). Identity unless overridden."""
        return rewards

    def merge_advantages(self, advantages: Float[Tensor, "sample column"]) -> Float[Tensor, "sample column"]:
        """Merge per-reward advantages, NaN where missing: (N, K) -> (N, K) or (N, 1). Identity unless overridden."""
        return advantages

    def covered(self, applies: Bool[Tensor, "sample reward"]) -> Bool[Tensor, "sample 1"]:
        """Which samples a merged column can have a value for: those with any reward. If none has one, merging has failed."""
        return applies.any(1, keepdim=True)

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        """Weights of the active rewards (see `self.active`) from their inner products, float64 on the CPU."""
        if len(gram) > 1:
            raise TypeError(f"{type(self).__name__} must override `weights` to merge {len(gram)} gradients.")
        return torch.ones_like(gram[0])

    @property
    def needs_gradients(self) -> bool:
        """Whether the method ever uses per-reward gradients. A single column needs none."""
        return len(self.names) > 1

    # Names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bind(tuple(cast(Mapping[str, object], pl_module.rewards)))
        dry_run(self)

    def bind(self, reward_names: Sequence[str]) -> None:
        """Set the rewards' names. A second call, or a call after `load_state_dict`, keeps the state.

        Raises:
            ValueError: There is no reward, or the names differ from those bound or loaded before.
        """
        check_names(reward_names, self.reward_names)
        if self.reward_names:
            return
        self.reward_names = tuple(reward_names)
        self.names = (self.merged_name,) if self.merged_name else self.reward_names
        self.active = torch.ones(len(self.names), dtype=torch.bool)
        self.smoothed = SmoothedWeights(self.initial_weights(), self.options.ema_decay)
        self.signal = SignalGram(len(self.names), self.options)

    def initial_weights(self) -> Float[Tensor, " reward"]:
        """Weights of rewards that have never been active, float64: equal ones unless overridden."""
        return torch.full((len(self.names),), 1 / len(self.names), dtype=torch.float64)

    # One optimizer step

    def begin_step(self, n_micro_batches: int) -> None:
        """Start an optimizer step of `n_micro_batches` micro-batches and decide whether it is a refresh step."""
        due = self.options.is_due(self.step) or self.smoothed.empty
        due = due and self.needs_gradients and not self.options.is_uniform(self.step)
        self._sum = GradientSum(self.options.estimated(n_micro_batches) if due else 0)
        self._solved, self.any_gradient_overflowed = None, False

    @property
    def wants_gradients(self) -> bool:
        """Whether the next micro-batch must deliver its per-reward gradients."""
        return self._sum.incomplete

    def add_gradients(self, gradients: Tensor, samples: Float[Tensor, "half reward"] | None = None) -> None:
        """Add one micro-batch's per-reward gradients, normalised so that their sum is the optimizer step's.

        Args:
            gradients: One row per reward; or with `samples` the two parts that it is the sum of, from the prompts of each
                half, the same halves for the whole optimizer step and on all ranks.
            samples: Number of the micro-batch's samples of each half that each reward applies to, up to a factor.

        Shape:
            gradients (K, P), or (2, K, P) with samples (2, K).
        """
        if samples is None and self.options.gram == "split":
            raise ValueError("`gram: split` needs the gradients of two halves of the prompts. Found none.")
        self._sum.add(gradients, samples, len(self.names))

    def solve(self, reduce: Callable[[Tensor], Tensor], loss_scaled: bool = False) -> Float[Tensor, " parameter"]:
        """Compute new merging coefficients and the merged gradient from the summed gradients, and free the sum.

        Args:
            reduce: Averages a tensor over the ranks.
            loss_scaled: Whether a loss scaler skips optimizer steps. Then a gradient that is not finite sets
                `any_gradient_overflowed`, the merged gradient is zero and the state does not change.

        Raises:
            RuntimeError: Gradients of some micro-batches are missing.
            ValueError: `weights` returned a wrong shape or a value that is not finite in float32.
        """
        gradients, samples = reduce(self._sum.take()), self._sum.samples
        products = products_of(gradients, None if samples is None else reduce(samples))
        norms = products.own.diagonal().sqrt()
        self.active = active_rows(norms)
        self.diagnostics = {"left_out": self._left_out(norms), "gradient_norms": norms, "products": products}
        self.any_gradient_overflowed = loss_scaled and not bool(norms.isfinite().all())
        rows = gradients.reshape(-1, gradients.shape[-1])
        if self.any_gradient_overflowed:
            log.warning("A gradient overflowed at optimizer step %d: skipped, the loss scale is reduced.", self.step)
            return torch.zeros_like(rows[0])
        if not self.active.any():
            log.warning("No reward has a finite, non-zero gradient at optimizer step %d: nothing merged.", self.step)
            return torch.zeros_like(rows[0])
        self.signal.update(products.where(self.active))
        self._refresh(self.signal.estimate(), products)
        return merge_rows(rows, self.loss_weights, self.active)

    def _refresh(self, gram: Float[Tensor, "reward reward"], products: Products) -> None:
        """Update the smoothed weights, and set the weights and diagnostics of this step.

        Args:
            gram: The inner products to solve on, used for the active rewards.
            products: Those of this refresh.
        """
        active, smoothed, options, reused = self.active, self.smoothed, self.options, self.reused_weights
        lengths = gram.diagonal().sqrt()
        new = call_weights(self.weights, gram[active][:, active], options.normalize)
        alpha = torch.zeros_like(smoothed.initial).masked_scatter(active, new)
        ratio = lengths[active].mean() / lengths if options.normalize else torch.ones_like(lengths)
        smoothed.update(alpha, active, self.step)
        applied = alpha if options.refresh_alpha == "fresh" else smoothed.alpha
        self._solved = as_float32(torch.where(active, applied * ratio, smoothed.alpha), self.names)

        harmony = self._alignment(products, {"update": self.loss_weights[active], "reused": reused[active]})
        self.counts["refreshes"] += 1
        self.counts["update_conflicts"] += in_conflict(harmony["update/cos_min"])
        self.counts["mean_conflicts"] += in_conflict(harmony["mean/cos_min"])
        age = self.step - smoothed.solved_at
        self.diagnostics |= {"alpha": alpha, "alpha_smoothed": smoothed.alpha, "alpha_age": age, **harmony}

    def _alignment(self, products: Products, directions: dict[str, Float[Tensor, " active"]]) -> dict[str, float]:
        """Gradient harmony of this step's update, and of the weights that the steps since the last refresh have used.

        The keys of products of halves begin with `split/`. The cosines with each reward are added to the diagnostics.
        """
        active, found = self.active, dict[str, float]()
        own, split = (gram[active][:, active] for gram in (products.own, products.split))
        for prefix, place, signal in (("", "own", None), ("split/", "split", split)):
            if signal is not None and not signal.isfinite().all():
                continue  # a reward was absent from a half, or there were none
            found |= {prefix + key: value for key, value in compare(own, directions, signal).items()}
            for name, coefficients in directions.items():
                values, nothing = cosines(own, coefficients, signal), torch.full_like(products.own[0], torch.nan)
                self.diagnostics[f"cosine/{name}/{place}"] = nothing.masked_scatter(active, values)
        return found

    def _left_out(self, norms: Float[Tensor, " reward"]) -> dict[str, str]:
        """The reason for each inactive reward, by name."""
        reasons = {name: "zero" if norm.isfinite() else "not finite" for name, norm in zip(self.names, norms, strict=True)}
        left_out = {name: reasons[name] for name in compress(self.names, ~self.active)}
        for name, reason in left_out.items():
            level = logging.WARNING if reason == "not finite" else logging.DEBUG
            log.log(level, "The gradient of %s is %s at optimizer step %d: left out.", name, reason, self.step)
        return left_out

    @property
    def loss_weights(self) -> Float[Tensor, " reward"]:
        """Weight of each reward's loss in the scalarised loss of the current step: (K,) float32 on the CPU."""
        if self.options.is_uniform(self.step):
            return torch.full((len(self.names),), 1 / len(self.names))
        return self.reused_weights if self._solved is None else self._solved

    @property
    def reused_weights(self) -> Float[Tensor, " reward"]:
        """The `loss_weights` of steps between two refreshes: (K,) float32 on the CPU."""
        return as_float32(self.smoothed.alpha, self.names)

    @property
    def solved(self) -> bool:
        """Whether this optimizer step's weights were computed from its own gradients."""
        return self._solved is not None

    @property
    def cadence(self) -> dict[str, Any]:
        """The options named in `CADENCE` that change the method; empty if it never uses per-reward gradients."""
        return self.options.cadence if self.needs_gradients else {}

    def end_step(self) -> None:
        """End an optimizer step, after the optimizer has stepped; one whose reward gradients overflowed is not counted."""
        self.step += not self.any_gradient_overflowed
        self._sum, self._solved = GradientSum(), None

    # Checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn if the run resumes from a checkpoint that was trained with another balancer."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            current = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
            previous = ", ".join(sorted(set(checkpoint["callbacks"]) - current)) or "another balancer"
            rank_zero_warn(f"{trainer.ckpt_path} was trained with {previous}; this run resumes with {self.state_key}.")

    def state_dict(self) -> dict[str, Any]:
        """The state between two optimizer steps; NaN where a reward has never been active."""
        if not self.names:
            return {}
        counts, memory = dict(self.counts), deepcopy(self.memory)
        state = {"reward_names": list(self.reward_names), "step": self.step, "counts": counts, "memory": memory}
        return state | self.smoothed.state_dict() | {"signal": self.signal.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`, before or after `bind`.

        Raises:
            ValueError: Its rewards differ from those of the run.
        """
        self.bind(state_dict["reward_names"])
        self.step, self.counts = state_dict["step"], dict(state_dict["counts"])
        self.memory = deepcopy(state_dict["memory"])
        self.smoothed.load_state_dict(state_dict)
        self.signal.load_state_dict(state_dict["signal"])
