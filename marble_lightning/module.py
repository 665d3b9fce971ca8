"""DiffusionNFT on several rewards, as a LightningModule: one epoch is one round of sampling and training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from balancers import Balancer
from marble_lightning import checks
from marble_lightning.callback_checks import check_callbacks, check_monitors, metric_names
from marble_lightning.checkpoints.adapters import check_adapters
from marble_lightning.checkpoints.content import TO_EVALUATE, TO_FIT, check_content
from marble_lightning.checkpoints.files import use_whole_files, warn
from marble_lightning.checkpoints.round_start import RoundStart
from marble_lightning.checkpoints.signals import stop_if_requested, stop_requested
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.evaluator import Evaluator, HeldOut
from marble_lightning.evaluation.image_statistics import image_statistics
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.nft.divergence import Finite
from marble_lightning.nft.loss import Coefficients, Objective
from marble_lightning.nft.optimizer import adamw, clip_unscaled, with_schedule
from marble_lightning.nft.rollout import MicroBatch, MicroBatches, Rollout, begin_round, compute_coefficients, micro_batches
from marble_lightning.nft.sampling import Sampling, ScoredRollout, sample_round, seed_key
from marble_lightning.nft.step import TrainingStep
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import ADAPTERS, FlowPolicy, is_adapter
from marble_lightning.run_folder import run_folder
from marble_lightning.scoring.failures import load_rewards
from marble_lightning.scoring.reward_names import rewards_and_metrics
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.distributed import broadcast_only
from marble_lightning.utils.loggers import log_metrics
from marble_lightning.utils.validation import require_positive
from rewards import Reward


class DiffusionNFT(LightningModule):
    """Online RL fine-tuning of SD3 with several rewards, merged by the trainer's Balancer callback.

    Args:
        policy: The model that learns.
        rewards: Rewards to learn, by the name they are logged under; null removes a reward of an earlier configuration. In
            a later file, a mapping with only nulls removes these rewards, and any other mapping replaces all.
        metrics: Rewards that only score held-out prompts and are not learned; null as with rewards.
        sampling: How a round is sampled.
        scoring: Where images are scored, and what happens where a reward fails.
        objective: The NFT loss.
        averaging: How the old and the averaged adapter follow the trained one.
        evaluation: How held-out prompts are sampled.
        optimizer: Makes the optimizer of the adapter's parameters.
        lr_scheduler: Makes the schedule of the learning rate, which steps after every optimizer step; null for none.
        micro_batch_size: Images of one forward and backward pass, >= 1.
        optimizer_steps_per_round: Optimizer steps an inner epoch is split into, >= 1.
        inner_epochs: How often a round is trained on, each time in another order, at other times and with other noise, >= 1.
        gradient_passes: Backward passes for the per-reward gradients: `two`, for any number of rewards, or one
            `per_reward`. The latter is the reference, and also supports trainable parameters outside linear layers.
        seed: Seed of all random generators.

    Source: DiffusionNFT, arXiv 2509.16117; MARBLE, arXiv 2605.06507. Defaults are those of the published run.
    """

    strict_loading = False  # checkpoints hold only adapters; `on_load_checkpoint` checks that they are complete

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
        learned, only_scored = rewards_and_metrics(rewards, metrics or {})
        super().__init__()
        self.policy, self.seed = policy, seed
        self.rewards, self.metrics = learned, only_scored  # no submodules: only the scorer moves them, each to its device
        self.sampling, self.objective, self.averaging = sampling, objective, averaging
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        require_positive(micro_batch_size=micro_batch_size, optimizer_steps_per_round=optimizer_steps_per_round)
        require_positive(inner_epochs=inner_epochs)
        self.sizes = (micro_batch_size, optimizer_steps_per_round, inner_epochs)
        self.gradient_passes = gradient_passes
        self.scorer = Scorer(self.reward_models, scoring, self.metrics)
        self.finite = Finite()
        self.evaluator = Evaluator(policy, self.scorer, evaluation, seed, self.finite)
        self.held_out_scores = self.evaluator.scores  # registered here, so that Lightning moves it to the device
        self.round_start = RoundStart()
        self.image_statistics: Tensor | None = None
        """Statistics of the round's images, (prompt, statistic); see `image_statistics`."""
        self.run_config: str | None = None
        """The run's configuration as YAML, kept in checkpoints; None outside the command line."""

    @property
    def reward_models(self) -> dict[str, Reward]:
        """Rewards and metrics, which score held-out images."""
        return self.rewards | self.metrics

    # Setting up -----------------------------------------------------------------------------------------------------

    def check(self, stage: str) -> None:
        """Check settings and prompts once the data module is set up. Loads no weights and writes no files."""
        data, trainer = get_datamodule(self.trainer), self.trainer
        if stage == "fit":
            self.balancer = checks.get_balancer(trainer)
            self.plan = checks.plan_round(trainer, self.sampling, self.objective, *self.sizes)
            checks.check_training(self.policy, self.rewards, data)
        checks.check_precision(trainer)
        checks.check_strategy(trainer, self.policy)
        use_whole_files(trainer)
        check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        if stage != "fit" or trainer.limit_val_batches:
            checks.check_held_out_prompts(trainer)
        self.evaluator.select_reward_models(stage, data.held_out)
        checks.check_prompts(self.evaluator.selected, data.held_out)
        self.policy.check()
        self.evaluator.check_resolution(stage)
        if stage == "fit":
            check_monitors(trainer.callbacks, self, metric_names(self))  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check, then load the weights of the policy and of the rewards and metrics that score."""
        self.check(stage)
        self.policy.setup(self.seed)
        load_rewards(self.evaluator.selected)
        self.scorer.stopping = partial(stop_requested, self.trainer)
        self.scorer.setup(run_folder(self.trainer), f"_{self.trainer.global_rank}" if self.trainer.world_size > 1 else "")
        checks.check_same_weights(self.trainer, self.policy, self.evaluator.selected)
        broadcast_only(self, [parameter for name in ADAPTERS for parameter in self.policy.parameters_of(name)])
        if self.trainer.is_global_zero:
            checks.warn_about_prompts(self.policy, self.evaluator.selected, get_datamodule(self.trainer))
        self.trainable = self.policy.parameters_of("trained")
        self.step = TrainingStep(self.policy, self.objective, self.trainable, self.gradient_passes)
        if stage == "fit":
            self.trainer.accumulate_grad_batches = self.plan.per_step
            if self.balancer.needs_gradients:
                _ = self.step.per_reward  # raises now if per-reward gradients cannot be computed

    def teardown(self, stage: str) -> None:
        self.scorer.stop()
        self.scorer.move_to_cpu()  # as Lightning does with the policy
        if stage == "fit":
            self.trainer.accumulate_grad_batches = 1

    def configure_optimizers(self) -> Any:
        return with_schedule(self.optimizer(self.trainable), self.lr_scheduler, self.scaler)

    # A round: sample, score, compute coefficients -------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Sample this round with the old adapter, score it, and turn the scores into coefficients."""
        self.round_start.keep(self.trainer)
        begin = time.perf_counter()
        sampled = self.sample_round(self.seed)
        self.rollout, self.scores = sampled.rollout, sampled.scores
        self.image_statistics = image_statistics(sampled.images, self.rollout.groups)
        self.round_metrics = sampled.metrics(self.trainer, self.rewards, self.scorer)
        self.round_metrics |= begin_round(self.balancer, self.scores, self.rollout.groups, self.trainer)
        del sampled  # its images take gigabytes that training needs
        self.coefficients = self.compute_coefficients(self.rollout, self.scores, self.seed, self.balancer)
        self.trained_since = time.perf_counter()
        self.round_metrics["time/sampling"] = self.trained_since - begin - self.round_metrics["time/waiting_for_scores"]
        self.log_dict(self.round_metrics, sync_dist=True)

    def sample_round(self, seed: int) -> ScoredRollout:
        """Sample and score a round with a seed of prompts and noise, see `nft.sampling.sample_round`."""
        return sample_round(self.trainer, self.policy, self.scorer, list(self.rewards), self.sampling, self.finite, seed)

    def compute_coefficients(
        self, rollout: Rollout, scores: Tensor, seed: int, balancer: Balancer | None
    ) -> list[Coefficients]:
        """Loss coefficients of a round, one item per inner epoch, see `nft.rollout.compute_coefficients`."""
        keys, groups, scoring = self._inner_epochs(seed), rollout.groups, self.scorer.settings
        return compute_coefficients(scores, groups, balancer, self.objective, self.plan, keys, self.trainer, scoring)

    def _inner_epochs(self, seed: int) -> list[tuple[int | str, ...]]:
        purposes = [f"train {index}" if index else "train" for index in range(self.plan.inner_epochs)]
        return [seed_key(self.trainer, seed, purpose) for purpose in purposes]

    # Training on the round ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> MicroBatches:
        return MicroBatches(self.plan.total, lambda: self.split_round(self.rollout, self.coefficients, self.seed))

    def split_round(self, rollout: Rollout, coefficients: list[Coefficients], seed: int) -> Iterator[MicroBatch]:
        """Split a round into micro-batches, inner epoch by inner epoch."""
        grid = self.policy.sigmas(self.sampling.steps)[: self.sampling.usable_times]
        for key, of_epoch in zip(self._inner_epochs(seed), coefficients, strict=True):
            yield from micro_batches(rollout, of_epoch, grid, self.plan, key)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Compute the scalarised loss, or on a refresh the per-reward gradients; the KL term is added to both."""
        if batch_idx % self.plan.per_step == 0:
            self.balancer.begin_step(self.plan.per_step)
        with_kl, reduce = self.objective.has_kl(self.global_step, batch_idx), self.trainer.strategy.reduce
        loss, metrics = self.step(batch, with_kl, self.balancer, self.plan.per_step, reduce, self.scaler)
        self.log_dict(metrics, on_epoch=True, on_step=False, batch_size=1, sync_dist=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        try:
            super().backward(loss, *args, **kwargs)
        finally:  # also after an error, such as too little memory
            self.step.end_backward()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as Lightning does; under autocast Lightning would refuse fused optimizers even without a loss scaler."""
        if self.scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_unscaled(self.trainer.precision_plugin, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the merged gradient of a refresh to the KL gradient."""
        self.step.merged.write(self.trainable)

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """Update the averaged adapter after each optimizer step, and the old adapter after the last step of a round."""
        if self.scaler is None:  # a scaler skips steps with an infinite loss
            self.finite.note(outputs["loss"])
        if (batch_idx + 1) % self.plan.per_step:
            return
        self.balancer.end_step()
        self.averaging.update_averaged(self.policy, self.global_step)
        if batch_idx + 1 == self.plan.total:
            self.averaging.update_old(self.policy, self.global_step)
            with self.trainer.precision_plugin.forward_context():  # no loss follows: check the adapter that samples next
                self.finite.note(self.step.velocity(batch, "old"))
            self.log("time/training", time.perf_counter() - self.trained_since, sync_dist=True)
        self.finite.note(*self.trainable)
        self.finite.check_step(self.trainer.strategy, self.global_step, self.scaler)

    # Held-out prompts -----------------------------------------------------------------------------------------------

    def predict_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluator.predict(self.trainer, batch, batch_idx)

    def validation_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluator.evaluate(self.trainer, batch, batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        stop_if_requested(self.trainer, "the held-out prompts")  # after a stop some scores may be missing
        means = self.evaluator.finish(self.trainer)
        if not self.trainer.sanity_checking:
            self.log_dict(means, sync_dist=True)
        else:
            log_metrics(self.trainer, means, step=0)
        self.round_start.note_validation_end(self.trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self) -> None:
        stop_if_requested(self.trainer, "the held-out prompts")
        self.evaluator.check_images(self.trainer)
        self.scorer.check(self.trainer.strategy)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save only adapters and no frozen weights; in the middle of a round, save the state of its beginning."""
        adapters = {name: tensor for name, tensor in checkpoint["state_dict"].items() if is_adapter(name)}
        checkpoint["state_dict"], checkpoint["lora"] = adapters, self.policy.lora
        checkpoint |= self.evaluator.held_out_state(self.trainer)
        checkpoint["base_model"], checkpoint["rewards"] = self.policy.identity, list(self.rewards)
        checkpoint["config"] = self.run_config
        self.round_start.put_into(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's adapters fit this policy, and reuse its held-out scores if they still apply."""
        checks.check_adapter_is_used(self.policy, self.trainer.ckpt_path)
        check_content(checkpoint, TO_FIT if self.trainer.state.fn == "fit" else TO_EVALUATE, self.trainer.ckpt_path)
        check_adapters(self.state_dict(), checkpoint, self.policy.lora, self.policy.path, is_adapter)
        if checkpoint["base_model"] != self.policy.identity:
            warn(f"The checkpoint was trained on {checkpoint['base_model']}, and this policy is {self.policy.identity}.")
        self.evaluator.load_held_out_state(self.trainer, checkpoint)
