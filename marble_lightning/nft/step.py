"""The training step of one micro-batch: the loss, or on a refresh the gradients of all rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from balancers import Balancer
from marble_lightning.nft.loss import Objective, nft_losses
from marble_lightning.nft.reward_gradients import MergedGradient, RewardGradients
from marble_lightning.nft.rollout import MicroBatch
from marble_lightning.policies.base import Adapter, FlowPolicy


class TrainingStep:
    """Computes the scalarised loss of a micro-batch, or on a refresh its per-reward gradients; both with the KL term.

    Args:
        policy: The model that is trained.
        objective: The NFT loss.
        trainable: The policy's trainable parameters.
        gradient_passes: How per-reward gradients are computed, see `RewardGradients`.

    Source: DiffusionNFT, arXiv 2509.16117; MARBLE, arXiv 2605.06507, algorithm 1.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        objective: Objective,
        trainable: Sequence[nn.Parameter],
        gradient_passes: Literal["two", "per_reward"],
    ) -> None:
        self.policy, self.objective, self.trainable = policy, objective, trainable
        self.gradient_passes = gradient_passes
        self.merged = MergedGradient()
        self._until_backward = ExitStack()

    @cached_property
    def per_reward(self) -> RewardGradients:
        """Computes per-reward gradients.

        Raises:
            ValueError: `gradient_passes` does not support a trainable parameter.
        """
        return RewardGradients(self.gradient_passes, self.policy.transformer, self.trainable)

    def __call__(
        self,
        batch: MicroBatch,
        with_kl: bool,
        balancer: Balancer,
        per_step: int,
        reduce: Callable[[Tensor], Tensor],
        scaler: GradScaler | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss that `training_step` returns, and the values that it logs.

        On a refresh the capture of per-reward gradients stays on until `end_backward`, since gradient checkpointing runs
        layers again in the backward pass of the loss.

        Args:
            batch: Some images, each at one flow time.
            with_kl: Whether the KL term is computed, see `Objective.has_kl`.
            balancer: Merges the rewards.
            per_step: Micro-batches of an optimizer step.
            reduce: Averages a tensor over the ranks.
            scaler: The loss scaler in half precision, or None.

        Returns:
            The loss, and the values to log by name.
        """
        old, base = self.frozen_velocities(batch, with_kl)
        with ExitStack() as stack:
            if balancer.wants_gradients:
                stack.enter_context(self.per_reward.capture())
            plus, minus, kl = self.sample_losses_and_kl(batch, old, base)
            losses = batch.coefficients.losses(plus, minus)
            logged = {"loss": losses.detach().sum() * per_step} | ({} if kl is None else {"kl": kl.detach()})
            weighted_kl = self.zero_loss() if kl is None else self.objective.kl_weight * self.objective.kl_every * kl
            if balancer.wants_gradients:
                self._add_gradients(balancer, plus, minus, batch, scaler)
                if not balancer.wants_gradients:
                    self.merged.hold(balancer.solve(reduce, loss_scaled=scaler is not None))
                # The scaler checks only this loss: if a per-reward gradient overflowed, it must skip the step
                loss = weighted_kl * (torch.inf if balancer.any_gradient_overflowed else 1.0)
            else:
                weights = balancer.loss_weights.to(losses, non_blocking=True)
                # Lightning divides by the micro-batches of a step, but the coefficients are already normalised over it
                loss = (weights * losses).sum() * per_step + weighted_kl
            self._until_backward = stack.pop_all()
        return loss, logged

    def _add_gradients(
        self, balancer: Balancer, plus: Tensor, minus: Tensor, batch: MicroBatch, scaler: GradScaler | None
    ) -> None:
        """Add the micro-batch's per-reward gradients; with `measure_signal` in two parts, from the halves of the prompts."""
        if not balancer.options.measure_signal:
            balancer.add_gradients(self.per_reward(plus, minus, batch.coefficients, scaler))
            return
        parts = batch.coefficients.split(batch.in_first)
        gradients, samples = self.per_reward(plus, minus, parts, scaler), parts.samples
        balancer.add_gradients(gradients.unflatten(0, (2, -1)), samples.unflatten(0, (2, -1)))

    def end_backward(self) -> None:
        """End the capture of per-reward gradients, if the forward pass began one."""
        self._until_backward.close()

    def frozen_velocities(self, batch: MicroBatch, with_kl: bool) -> tuple[Tensor, Tensor | None]:
        """Velocities of the adapter that sampled the round and of the base; the latter is None without a KL term.

        They need no capture, so they run compiled on a refresh too.
        """
        return self.velocity(batch, "old"), self.velocity(batch, None) if with_kl else None

    def sample_losses_and_kl(
        self, batch: MicroBatch, old: Tensor, base: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """L+ and L- of each sample, and the KL term before it is weighted; None without the base's velocity.

        Args:
            batch: Some images, each at one flow time.
            old: From `frozen_velocities`.
            base: From `frozen_velocities`.
        """
        velocity = self.velocity(batch, "trained")
        plus, minus = nft_losses(velocity, old, batch.noisy, batch.clean, batch.t, self.objective.beta)
        return plus, minus, None if base is None else (velocity - base).square().mean()

    def zero_loss(self) -> Tensor:
        """A zero loss with a zero gradient for every parameter, since DistributedDataParallel waits for all of them."""
        return torch.stack([(parameter * 0).sum() for parameter in self.trainable]).sum()

    def velocity(self, batch: MicroBatch, adapter: Adapter | None) -> Tensor:
        """v(x_t, t) with one adapter, or with none; with a graph for the trained adapter only."""
        with torch.set_grad_enabled(adapter == "trained"), self.policy.use_adapter(adapter):
            return self.policy.velocity(batch.noisy, batch.t, batch.conditions)
