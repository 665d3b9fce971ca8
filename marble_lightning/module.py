"""DiffusionNFT on several rewards, as a LightningModule: one epoch is one round of sampling and training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from tqdm import tqdm

from balancers import Balancer, WeightedSum
from marble_lightning import checks
from marble_lightning.callback_checks import check_monitors
from marble_lightning.checkpoints.signals import end_if_asked
from marble_lightning.evaluation.evaluator import HeldOutEvaluation
from marble_lightning.evaluation.image_statistics import NAMES
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.nft.loss import Coefficients, Objective, nft_losses
from marble_lightning.nft.reward_gradients import RewardGradients, add_flat, flat
from marble_lightning.nft.rollout import MicroBatch, MicroBatches, Rollout, Sampled, Sampling, micro_batches, weigh_round
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import Adapter, FlowPolicy
from marble_lightning.scoring.reward_names import named_rewards
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.seeds import generator
from marble_lightning.utils.validation import must
from rewards import Reward


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with the published settings."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)


class DiffusionNFT(HeldOutEvaluation):
    """Online RL fine-tuning of SD3 with several rewards, merged by the trainer's Balancer callback.

    Args:
        policy: The model that learns.
        rewards: Rewards to learn, by the name they are logged under; null drops one that an earlier configuration names.
            In a later file, a mapping to nulls drops these, and any other replaces all.
        metrics: Rewards that are only measured, on held-out prompts; null as with rewards.
        sampling: How a round is sampled.
        scoring: Where pictures are scored, and what happens where a reward fails.
        objective: The NFT loss.
        averaging: How the old and the averaged adapter follow the trained one.
        evaluation: How held-out prompts are sampled.
        optimizer: Makes the optimizer of the adapter's parameters.
        lr_scheduler: Makes the learning rate's schedule, which moves on after every optimizer step; null for none.
        micro_batch_size: Pictures of one forward and backward pass, >= 1.
        optimizer_steps_per_round: Optimizer steps an inner epoch is split into, >= 1.
        inner_epochs: How often a round is trained on, each time in another order, at other times and with other noise, >= 1.
        gradient_passes: Per-reward gradients by `two` backward passes, whatever the number of rewards, or by one
            `per_reward`, the reference, which also knows trainable parameters outside linear layers.
        seed: Seed of everything random.

    Source: DiffusionNFT, arXiv 2509.16117; MARBLE, arXiv 2605.06507. Defaults are as in `settings`.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        rewards: Mapping[str, Reward | None],
        metrics: Mapping[str, Reward | None] | None = None,
        sampling: Sampling = Sampling(),
        scoring: Scoring = Scoring(),
        objective: Objective = Objective(),
        averaging: Averaging = Averaging(),
        evaluation: Evaluation = Evaluation(),
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_size: int = 9,
        optimizer_steps_per_round: int = 1,
        inner_epochs: int = 1,
        gradient_passes: Literal["two", "per_reward"] = "two",
        seed: int = 0,
    ) -> None:
        learned, measured = named_rewards("rewards", rewards), named_rewards("metrics", metrics or {})
        super().__init__(policy, learned, measured, scoring, evaluation, seed)
        must(bool(learned), "`rewards` must name at least one reward", "none; the configuration `tiny` has five")
        if twice := set(learned) & set(measured):
            raise ValueError(f"`metrics` must not use the name of a reward. Found {', '.join(sorted(twice))} in both.")
        self.sampling, self.objective, self.averaging = sampling, objective, averaging
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.sizes = (micro_batch_size, optimizer_steps_per_round, inner_epochs)
        for name, size in zip(("micro_batch_size", "optimizer_steps_per_round", "inner_epochs"), self.sizes, strict=True):
            must(size >= 1, f"`{name}` must be >= 1", size)
        self.gradient_passes = gradient_passes
        self.merged: Tensor | None = None
        """A refresh's merged gradient, flat, until it is written."""
        self.images: Tensor | None = None
        """The round's pictures (image, 3, pixel, pixel), for callbacks' `on_train_batch_start` of its first micro-batch."""

    # Setting up -----------------------------------------------------------------------------------------------------

    def check(self, stage: str) -> None:
        """Check what can be checked before weights are loaded."""
        if stage == "fit":
            if self.policy.adapter is None:
                raise ValueError("`policy.adapter` must be ema or trained for `fit`, which trains one. Found none.")
            self.balancer = checks.the_balancer(self.trainer)
            self.plan = checks.the_plan(self.trainer, self.sampling, *self.sizes)
            checks.every_reward_applies(self._learned, checks.the_data(self.trainer))
            checks.every_prompt_can_be_judged(self._learned, checks.the_data(self.trainer).training)
        super().check(stage)
        if stage == "fit":
            check_monitors(self.trainer.callbacks, self, self.metric_names())  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check, then load the weights."""
        super().setup(stage)
        if stage == "fit":
            self.trainer.accumulate_grad_batches = self.plan.per_step
        self.trainable = self.policy.parameters_of("trained")
        if stage == "fit" and self.balancer.needs_gradients:
            self.per_reward.expect(False)  # raises now where they cannot be had

    def metric_names(self) -> set[str]:
        """Names of the metrics that every round logs, with those of validations where the trainer has any."""
        per_reward = {f"{kind}/{name}" for kind in ("train", "missing", "skipped", "time/scoring") for name in self.rewards}
        plain = {"loss", "time/sampling", "time/waiting_for_scores", "time/training"}
        plain |= {"kl"} if self.objective.kl_weight else set[str]()
        held_out = super().metric_names() if self.trainer.limit_val_batches else set[str]()
        return per_reward | plain | held_out | {f"images/{name}" for name in NAMES}

    @cached_property
    def per_reward(self) -> RewardGradients:
        """Takes per-reward gradients."""
        return RewardGradients(self.gradient_passes, self.policy.transformer, self.trainable)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.trainer.accumulate_grad_batches = 1

    @property
    def _learned(self) -> dict[str, Reward]:
        return cast(dict[str, Reward], dict(self.rewards.items()))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.trainable)
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        checks.the_optimizer_fits(optimizer, scheduler, self._scaler)
        stepped = {"lr_scheduler": {"scheduler": scheduler, "interval": "step"}} if scheduler else {}
        return {"optimizer": optimizer, **stepped}

    # A round: sample, score, compare --------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Sample this round with the old adapter, score it, and turn the scores into coefficients."""
        self.round_start.keep(self.trainer)
        begin = time.perf_counter()
        self.rollout, self.images, self.scores, skipped, waited = self.sample_round(self.seed)
        self.weighed = self._weighed(self.rollout, self.scores, self.seed, self.balancer)
        self.trained_since = time.perf_counter()
        means = self.trainer.strategy.all_gather(self.scores).reshape(-1, len(self.rewards)).nanmean(0)
        missing = torch.tensor([float(reward.missing) for reward in self._learned.values()], device=self.device)
        missing = self.trainer.strategy.reduce(missing, reduce_op="sum")
        shown = {f"train/{name}": mean for name, mean in zip(self.rewards, means, strict=True)}
        shown |= {f"missing/{name}": count for name, count in zip(self.rewards, missing, strict=True)}
        shown |= {f"skipped/{name}": skipped[name] for name in self.rewards}
        shown |= {f"time/scoring/{name}": seconds for name, seconds in self.scorer.seconds.items()}
        shown |= {"time/sampling": self.trained_since - begin - waited, "time/waiting_for_scores": waited}
        self.log_dict(shown, sync_dist=True)

    def sample_round(self, seed: int) -> Sampled:
        """Sample the k pictures of each distinct prompt, encoded once, with the old adapter, scoring them meanwhile.

        Args:
            seed: Of prompts and noise: the run's for the round to train on, another for an independent one.

        Raises:
            Diverged: Pictures are not finite; on all ranks.
            RewardError: A reward failed; on all ranks, whichever it was.
        """
        self.scorer.release()  # Lightning put them there, and text encoders need the room
        data = checks.the_data(self.trainer)
        prompts = data.round(seed, self.current_epoch, self.global_rank, self.trainer.world_size)
        conditions = self.policy.encode([prompt.text for prompt in prompts])
        groups = torch.arange(len(prompts)).repeat_interleave(data.images_per_prompt)
        latents, side = [], self.policy.resolution
        images = torch.empty(len(groups), 3, side, side, device=self.device)  # to be filled: there is no room for them twice
        for chunk in self._progress(torch.arange(len(groups)).split(self.sampling.batch_size), "sampling"):
            end_if_asked(self.trainer)
            noise = [generator(*self._key(seed, "rollout"), index) for index in chunk.tolist()]
            own = groups[chunk]
            with self.trainer.precision_plugin.forward_context():  # as in training, so that the loss sees its own policy
                sampled = self.policy.sample(
                    conditions[own.to(self.device)], noise, "old", steps=self.sampling.steps, solver=self.sampling.solver
                )
            latents.append(sampled)
            drawn = images[chunk[0] : chunk[-1] + 1].copy_(self.policy.decode(sampled))
            self.finite.note(sampled, drawn)
            self.scorer.submit(drawn, [prompts[group] for group in own.tolist()], self.rewards)
        sampled_all = time.perf_counter()
        scores = self.scorer.collect(lambda jobs: self._progress(jobs, "scoring"))
        waited = time.perf_counter() - sampled_all
        end_if_asked(self.trainer)  # some scores may have been given up
        self.finite.check_pictures(self.trainer.strategy, trained=self.global_step > 0)
        skipped = self.scorer.check(self.trainer.strategy)
        self.scorer.release()
        return Sampled(Rollout(conditions, groups.to(self.device), torch.cat(latents)), images, scores, skipped, waited)

    def _weighed(self, rollout: Rollout, scores: Tensor, seed: int, balancer: Balancer | None) -> list[Coefficients]:
        keys = self._inner_epochs(seed)
        settings = self.scorer.settings
        return weigh_round(scores, rollout.groups, balancer, self.objective, self.plan, keys, self.trainer, settings)

    def _inner_epochs(self, seed: int) -> list[tuple[int | str, ...]]:
        return [self._key(seed, f"train {index}" if index else "train") for index in range(self.plan.inner_epochs)]

    def _key(self, seed: int, purpose: str) -> tuple[int | str, ...]:
        return seed, self.current_epoch, self.global_rank, purpose

    def _progress(self, iterable: Any, doing: str) -> Any:
        silent = not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        return tqdm(iterable, f"Round {self.current_epoch}: {doing}", leave=False, dynamic_ncols=True, disable=silent)

    # Training on it -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> MicroBatches:
        return MicroBatches(self.plan.total, lambda: self._cut(self.rollout, self.weighed, self.seed))

    def _cut(self, rollout: Rollout, weighed: list[Coefficients], seed: int) -> Iterator[MicroBatch]:
        grid = self.policy.sigmas(self.sampling.steps)[: self.sampling.usable_times]
        for key, own in zip(self._inner_epochs(seed), weighed, strict=True):
            yield from micro_batches(rollout, own, grid, self.plan, key)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        self.images = None  # callbacks come first and have seen them

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """The scalarised loss, or on a refresh the per-reward gradients; the KL term beside either."""
        if batch_idx % self.plan.per_step == 0:
            self.balancer.begin_step(self.plan.per_step)
        if self.balancer.needs_gradients:
            self.per_reward.expect(self.balancer.wants_gradients)
        velocity = self._velocity(batch, "trained")
        plus, minus = self._sample_losses(batch, velocity)
        losses = batch.coefficients.losses(plus, minus)
        shown = {"loss": losses.detach().sum() * self.plan.per_step}
        weighted_kl = self._nothing()
        if self.objective.kl_weight:
            kl = (velocity - self._velocity(batch, None)).square().mean()
            shown["kl"], weighted_kl = kl.detach(), self.objective.kl_weight * kl
        self.log_dict(shown, on_epoch=True, on_step=False, batch_size=1, sync_dist=True)

        if self.balancer.wants_gradients:
            self.balancer.add_gradients(self.per_reward(plus, minus, batch.coefficients, self._scaler))
            overflow = False
            if not self.balancer.wants_gradients:
                self.merged = self.balancer.solve(self.trainer.strategy.reduce, loss_scaled=self._scaler is not None)
                # A scaler only sees this loss: where a gradient did not fit half precision, it must skip the step
                overflow = self.balancer.any_gradient_overflowed
            return weighted_kl * (torch.inf if overflow else 1.0)
        weights = self.balancer.loss_weights.to(losses, non_blocking=True)
        # Lightning divides by the micro-batches of a step; the coefficients already count over all of them
        return (weights * losses).sum() * self.plan.per_step + weighted_kl

    def _nothing(self) -> Tensor:
        """Zero, whose gradient is zero for every parameter: DistributedDataParallel waits for all of them."""
        return torch.stack([(parameter * 0).sum() for parameter in self.trainable]).sum()

    def _velocity(self, batch: MicroBatch, adapter: Adapter | None) -> Tensor:
        with torch.set_grad_enabled(adapter == "trained"), self.policy.using(adapter):
            return self.policy.velocity(batch.noisy, batch.t, batch.conditions)

    def _sample_losses(self, batch: MicroBatch, velocity: Tensor) -> tuple[Tensor, Tensor]:
        old = self._velocity(batch, "old")
        return nft_losses(velocity, old, batch.noisy, batch.clean, batch.t, self.objective.beta)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As Lightning clips, which under autocast refuses fused optimizers although no loss is scaled."""
        if self._scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            algorithm = gradient_clip_algorithm or GradClipAlgorithmType.NORM
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a refresh's merged gradient beside the KL gradient."""
        if self.merged is not None:
            add_flat(self.merged, self.trainable)
            self.merged = None

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """After an optimizer step the averaged adapter follows; after the round's last one the old adapter does."""
        if self._scaler is None:  # it skips a step where a loss is infinite
            self.finite.note(outputs["loss"])
        if (batch_idx + 1) % self.plan.per_step:
            return
        if self.balancer.needs_gradients:
            self.per_reward.expect(False)
        self.balancer.end_step()
        keep = self.averaging.averaged_decay(self.global_step)
        must(0 <= keep <= 1, f"`averaged_decay` of {type(self.averaging).__name__} must return 0 to 1", keep)
        self.policy.move("ema", towards="trained", by=1 - keep)
        if batch_idx + 1 == self.plan.total:
            keep = self.averaging.old_decay(self.global_step)
            must(0 <= keep <= 1, f"`old_decay` of {type(self.averaging).__name__} must return 0 to 1", keep)
            self.policy.move("old", towards="trained", by=1 - keep)
            with self.trainer.precision_plugin.forward_context():  # no loss follows the last step: try what samples next
                self.finite.note(self._velocity(batch, "old"))
            self.log("time/training", time.perf_counter() - self.trained_since, sync_dist=True)
        self.finite.note(*self.trainable)
        self.finite.check_step(self.trainer.strategy, self.global_step, self._scaler)

    # For those who look on ------------------------------------------------------------------------------------------

    def update(self) -> Tensor:
        """The gradient about to be applied, flat: what has been gathered and, on a refresh, the merged gradient."""
        update = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable])
        return update if self.merged is None else update + self.merged

    @torch.enable_grad()
    def reward_gradients(self, rollout: Rollout, scores: Tensor, seed: int, step: int) -> Tensor:
        """Every reward's gradient over the micro-batches of one optimizer step of a round, then that of the rewards' sum.

        (reward + 1, parameter), the mean over ranks, all of which must ask. Training goes on as if nobody had looked.

        Args:
            rollout: The round.
            scores: Its scores (image, reward).
            seed: Seed it was sampled with.
            step: Which of the round's optimizer steps.
        """
        self.per_reward.expect(True)
        total = torch.zeros(len(self.rewards) + 1, sum(p.numel() for p in self.trainable), device=self.device)
        summed = WeightedSum()
        summed.bind(tuple(self.rewards))
        columns = (self._weighed(rollout, scores, seed, balancer) for balancer in (None, summed))
        weighed = [each.beside(merged) for each, merged in zip(*columns, strict=True)]
        batches = self._cut(rollout, weighed, seed)
        for batch in islice(batches, step * self.plan.per_step, (step + 1) * self.plan.per_step):
            with self.trainer.precision_plugin.forward_context():
                losses = self._sample_losses(batch, self._velocity(batch, "trained"))
            total += self.per_reward(*losses, batch.coefficients, self._scaler)
        self.per_reward.expect(False)
        return self.trainer.strategy.reduce(total)
