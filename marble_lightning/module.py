"""DiffusionNFT on several rewards, as a LightningModule: one epoch is one round of sampling and training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from balancers import Balancer
from marble_lightning import checks
from marble_lightning.callback_checks import check_callbacks, check_monitors
from marble_lightning.checkpoints.adapters import check_adapters
from marble_lightning.checkpoints.content import TO_EVALUATE, TO_FIT, check_content
from marble_lightning.checkpoints.files import WholeCheckpointIO, warn
from marble_lightning.checkpoints.round_start import RoundStart
from marble_lightning.checkpoints.signals import stop_if_requested, stop_requested
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.evaluator import Evaluator, HeldOut
from marble_lightning.evaluation.image_statistics import NAMES, image_statistics
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.nft.divergence import Finite
from marble_lightning.nft.loss import Coefficients, Objective
from marble_lightning.nft.optimizer import adamw, check_optimizer, clip_unscaled
from marble_lightning.nft.rollout import MicroBatch, MicroBatches, Rollout, compute_coefficients, micro_batches
from marble_lightning.nft.sampling import Sampling, ScoredRollout, sample_round, seed_key
from marble_lightning.nft.step import TrainingStep
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import FlowPolicy, is_adapter
from marble_lightning.run_folder import run_folder
from marble_lightning.scoring.failures import exit_is_failure
from marble_lightning.scoring.reward_names import named_rewards
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.loggers import log_metrics
from marble_lightning.utils.validation import require
from rewards import Reward
from rewards.base import with_public_names


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
        learned, only_scored = named_rewards("rewards", rewards), named_rewards("metrics", metrics or {})
        super().__init__()
        require(bool(learned), "`rewards` must name at least one reward", "none; the configuration `tiny` has five")
        if twice := set(learned) & set(only_scored):
            raise ValueError(f"`metrics` must not use the name of a reward. Found {', '.join(sorted(twice))} in both.")
        self.policy, self.seed = policy, seed
        self.rewards, self.metrics = nn.ModuleDict(learned), nn.ModuleDict(only_scored)
        self.sampling, self.objective, self.averaging = sampling, objective, averaging
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.sizes = (micro_batch_size, optimizer_steps_per_round, inner_epochs)
        for name, size in zip(("micro_batch_size", "optimizer_steps_per_round", "inner_epochs"), self.sizes, strict=True):
            require(size >= 1, f"`{name}` must be >= 1", size)
        self.gradient_passes = gradient_passes
        self.scorer = Scorer(self.reward_models, scoring)
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
        return cast(dict[str, Reward], {**dict(self.rewards.items()), **dict(self.metrics.items())})

    # Setting up -----------------------------------------------------------------------------------------------------

    def check(self, stage: str) -> None:
        """Check settings and prompts once the data module is set up. Loads no weights and writes no files."""
        data = get_datamodule(self.trainer)
        if stage == "fit":
            if self.policy.adapter is None:
                raise ValueError("`policy.adapter` must be ema or trained for `fit`, which trains one. Found none.")
            self.balancer = checks.get_balancer(self.trainer)
            self.plan = checks.plan_round(self.trainer, self.sampling, *self.sizes)
            checks.check_rewards_apply(self._trained_rewards, data)
            checks.check_prompts(self._trained_rewards, data.training)
        checks.check_precision(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the default, not a plugin of the user
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        if stage != "fit" or self.trainer.limit_val_batches:
            checks.check_held_out_prompts(self.trainer)
        self.evaluator.select_reward_models(stage, data.held_out)
        checks.check_prompts(self.evaluator.selected, data.held_out)
        self.policy.check()
        self.evaluator.check_resolution(stage)
        if stage == "fit":
            check_monitors(self.trainer.callbacks, self, self.metric_names())  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check, then load the weights of the policy and of the rewards and metrics that score."""
        self.check(stage)
        self.policy.setup(self.seed)
        for name, reward_model in self.evaluator.selected.items():
            with exit_is_failure(name):
                reward_model.setup()
            reward_model.requires_grad_(False)
        self.scorer.stopping = partial(stop_requested, self.trainer)
        self.scorer.setup(run_folder(self.trainer), f"_{self.trainer.global_rank}" if self.trainer.world_size > 1 else "")
        # No buffer changes. Rewards may be on other devices, whose buffers DDP could not broadcast.
        constant = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constant)
        if self.trainer.is_global_zero:
            checks.warn_about_prompts(self.policy, self.evaluator.selected, get_datamodule(self.trainer))
        self.trainable = self.policy.parameters_of("trained")
        self.step = TrainingStep(self.policy, self.objective, self.trainable, self.gradient_passes)
        if stage == "fit":
            self.trainer.accumulate_grad_batches = self.plan.per_step
            if self.balancer.needs_gradients:
                self.step.per_reward.set_capture(False)  # raises now if per-reward gradients cannot be computed

    def metric_names(self) -> set[str]:
        """Names of the metrics that every round logs, including those of validations if the trainer has any."""
        per_reward = {f"{kind}/{name}" for kind in ("train", "missing", "skipped", "time/scoring") for name in self.rewards}
        plain = {"loss", "time/sampling", "time/waiting_for_scores", "time/training"}
        plain |= {"kl"} if self.objective.kl_weight else set[str]()
        validates = bool(self.trainer.limit_val_batches)
        held_out = self.evaluator.metric_names(get_datamodule(self.trainer).held_out) if validates else set[str]()
        return per_reward | plain | held_out | {f"images/{name}" for name in NAMES}

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.trainer.accumulate_grad_batches = 1

    @property
    def _trained_rewards(self) -> dict[str, Reward]:
        return cast(dict[str, Reward], dict(self.rewards.items()))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.trainable)
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        check_optimizer(optimizer, scheduler, self.scaler)
        per_step = {"lr_scheduler": {"scheduler": scheduler, "interval": "step"}} if scheduler else {}
        return {"optimizer": optimizer, **per_step}

    # A round: sample, score, compute coefficients -------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Sample this round with the old adapter, score it, and turn the scores into coefficients."""
        self.round_start.keep(self.trainer)
        begin = time.perf_counter()
        self.rollout, images, self.scores, skipped, waited = self.sample_round(self.seed)
        self.image_statistics = image_statistics(images, self.rollout.groups)
        del images  # frees gigabytes for training
        self.coefficients = self.compute_coefficients(self.rollout, self.scores, self.seed, self.balancer)
        self.trained_since = time.perf_counter()
        means = self.trainer.strategy.all_gather(self.scores).reshape(-1, len(self.rewards)).nanmean(0)
        missing = torch.tensor([float(reward.missing) for reward in self._trained_rewards.values()], device=self.device)
        missing = self.trainer.strategy.reduce(missing, reduce_op="sum")
        metrics = {f"train/{name}": mean for name, mean in zip(self.rewards, means, strict=True)}
        metrics |= {f"missing/{name}": count for name, count in zip(self.rewards, missing, strict=True)}
        metrics |= {f"skipped/{name}": skipped[name] for name in self.rewards}
        metrics |= {f"time/scoring/{name}": seconds for name, seconds in self.scorer.seconds.items()}
        metrics |= {"time/sampling": self.trained_since - begin - waited, "time/waiting_for_scores": waited}
        self.log_dict(metrics, sync_dist=True)

    def sample_round(self, seed: int) -> ScoredRollout:
        """Sample and score a round, see `nft.sampling.sample_round`.

        Args:
            seed: Seed of prompts and noise: the run's for the round to train on, another one for an independent round.
        """
        names = list(self.rewards)
        return sample_round(self.trainer, self.policy, self.scorer, names, self.sampling, self.finite, seed)

    def compute_coefficients(
        self, rollout: Rollout, scores: Tensor, seed: int, balancer: Balancer | None
    ) -> list[Coefficients]:
        """Loss coefficients of a round, one item per inner epoch, see `nft.rollout.compute_coefficients`."""
        keys, scoring = self._inner_epochs(seed), self.scorer.settings
        groups, objective = rollout.groups, self.objective
        return compute_coefficients(scores, groups, balancer, objective, self.plan, keys, self.trainer, scoring)

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
        loss, metrics = self.step(batch, self.balancer, self.plan.per_step, self.trainer.strategy.reduce, self.scaler)
        self.log_dict(metrics, on_epoch=True, on_step=False, batch_size=1, sync_dist=True)
        return loss

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
        if self.balancer.needs_gradients:
            self.step.per_reward.set_capture(False)
        self.balancer.end_step()
        keep = self.averaging.averaged_decay(self.global_step)
        require(0 <= keep <= 1, f"`averaged_decay` of {type(self.averaging).__name__} must return 0 to 1", keep)
        self.policy.lerp_adapter("ema", towards="trained", by=1 - keep)
        if batch_idx + 1 == self.plan.total:
            keep = self.averaging.old_decay(self.global_step)
            require(0 <= keep <= 1, f"`old_decay` of {type(self.averaging).__name__} must return 0 to 1", keep)
            self.policy.lerp_adapter("old", towards="trained", by=1 - keep)
            with self.trainer.precision_plugin.forward_context():  # no loss follows: check the adapter that samples next
                self.finite.note(self.step.velocity(batch, "old"))
            self.log("time/training", time.perf_counter() - self.trained_since, sync_dist=True)
        self.finite.note(*self.trainable)
        self.finite.check_step(self.trainer.strategy, self.global_step, self.scaler)

    # Held-out prompts -----------------------------------------------------------------------------------------------

    def predict_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluator.predict(self.trainer, batch)

    def validation_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluator.evaluate(self.trainer, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        stop_if_requested(self.trainer)  # after a stop some scores may be missing
        means = self.evaluator.finish(self.trainer)
        if not self.trainer.sanity_checking:
            self.log_dict(means, sync_dist=True)
        else:
            log_metrics(self.trainer, means, step=0)
        self.round_start.note_validation_end(self.trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self) -> None:
        stop_if_requested(self.trainer)
        self.evaluator.check_images(self.trainer)
        self.scorer.check(self.trainer.strategy)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save only adapters and no frozen weights; in the middle of a round, save the state of its beginning."""
        adapters = {name: tensor for name, tensor in checkpoint["state_dict"].items() if is_adapter(name)}
        checkpoint["state_dict"], checkpoint["lora"] = adapters, self.policy.lora
        checkpoint["base_scores"] = self.evaluator.base_scores
        checkpoint["base_measured"] = self.evaluator.baseline_key(self.trainer)
        checkpoint["base_model"], checkpoint["rewards"] = self.policy.identity, list(self.rewards)
        checkpoint["config"] = self.run_config
        self.round_start.put_into(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's adapters fit this policy, and reuse its base scores if they still apply."""
        fitting = self.trainer.state.fn == "fit"
        if self.policy.adapter is None:
            raise ValueError(
                "`ckpt_path` must be null where `policy.adapter` is none: a checkpoint holds adapters, and none is used. "
                f"Found {self.trainer.ckpt_path}; choose the adapter ema or trained to evaluate it."
            )
        check_content(checkpoint, TO_FIT if fitting else TO_EVALUATE, self.trainer.ckpt_path)
        check_adapters(self.state_dict(), checkpoint, self.policy.lora, self.policy.path, is_adapter)
        if checkpoint["base_model"] != self.policy.identity:
            warn(f"The checkpoint was trained on {checkpoint['base_model']}, and this policy is {self.policy.identity}.")
        same_baseline = with_public_names(checkpoint["base_measured"]) == self.evaluator.baseline_key(self.trainer)
        if same_baseline and checkpoint["base_scores"] is not None:
            self.evaluator.base_scores = checkpoint["base_scores"]
            self.trainer.num_sanity_val_steps = 0  # no need to evaluate the base again
        elif self.policy.init_lora is not None and fitting:
            self.trainer.num_sanity_val_steps = 0
            warn("The base is not evaluated: this run began at `policy.init_lora`, which the checkpoint's adapters replace.")
