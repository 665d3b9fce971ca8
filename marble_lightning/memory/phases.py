"""What each phase of a run takes beyond what stays, and computes, counted on fake tensors by the code that runs later."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from balancers.gramian import gram_matrix
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.image_statistics import PER_IMAGE
from marble_lightning.memory.ledger import Fakes, Ledger, bytes_of, tensors_of
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Coefficients
from marble_lightning.nft.rollout import MicroBatch
from marble_lightning.nft.step import TrainingStep
from marble_lightning.policies.base import Conditions


class Phases:
    """Counts the bytes that phases of a run take, and their floating-point operations; a phase is a `Ledger` of both.

    Args:
        module: Set up for `fit`, with its trainer. It does not change.
        images: Images of a round in one process.
        cuda: Whether to count for a GPU; tests count for a CPU.
    """

    def __init__(self, module: DiffusionNFT, images: int, cuda: bool = True) -> None:
        policy: Any = module.policy
        self.module, self.trainer, self.images = module, module.trainer, images
        self.fakes = Fakes(cuda)
        self.policy = self.fakes.copy(policy, *policy.text_encoders.values())
        self.policy.prompt_cache = None  # every prompt is encoded
        self.trained = self.policy.parameters_of("trained")
        self.unknown: dict[str, Exception] = {}
        """Rewards that could not be counted, or in part only, and why."""
        self._scored: dict[tuple[str, int], Ledger] = {}

    def latents(self, images: int, resolution: int | None = None) -> Tensor:
        """Latents of so many images, as sampling returns them."""
        pipeline = self.policy.pipeline
        side = (resolution or self.policy.resolution) // pipeline.vae_scale_factor
        with self.fakes.mode:
            return torch.empty(images, pipeline.transformer.config.in_channels, side, side, dtype=self.policy.dtype)

    def pixels(self, images: int) -> Tensor:
        """So many decoded images."""
        with self.fakes.mode:
            return torch.empty(images, 3, self.policy.resolution, self.policy.resolution)

    @cached_property
    def encoding(self) -> tuple[Conditions, Ledger]:
        """The conditions of a round's prompts, and what encoding them takes."""
        prompts = self.images // get_datamodule(self.trainer).images_per_prompt
        with self.fakes.counting() as ledger:
            conditions = self.policy.encode_longest(prompts)
        return conditions, ledger

    def _conditions(self, images: int) -> Conditions:
        return self.encoding[0][torch.zeros(images, dtype=torch.long)]

    def sample(self, images: int, guided: bool = False, resolution: int | None = None) -> Ledger:
        """One step of sampling a batch: the network without gradients, and the latents of a solver of two steps' memory.

        Args:
            images: Images of the batch.
            guided: Whether the empty prompt is beside each.
            resolution: Side of the images in pixels; None for the policy's.
        """
        with self.fakes.counting(*self.encoding[0].tensors.values()) as ledger, torch.no_grad(), self._precision():
            own = self._conditions(images)
            kept = [torch.empty_like(self.latents(images, resolution), dtype=torch.float32) for _ in range(3)]
            conditions = self._conditions(2 * images) if guided else own
            latents = self.latents(len(conditions.embeds), resolution)
            with self.policy.use_adapter("old"):
                self.policy.velocity(latents, torch.empty(len(latents)), conditions)
            del own, kept
        return ledger

    def decode(self, images: int, resolution: int | None = None) -> Ledger:
        """Decoding a batch.

        Args:
            images: Images of the batch.
            resolution: Side of the images in pixels; None for the policy's.
        """
        latents = self.latents(images, resolution)
        with self.fakes.counting(latents) as ledger:
            self.policy.decode(latents)
        return ledger

    def score(self, name: str, images: int) -> Ledger:
        """What a reward takes for a batch, beyond its weights, as far as it can be followed without data."""
        images = min(images, self.module.reward_models[name].batch_size)
        if (name, images) not in self._scored:
            self._scored[name, images] = self._score(name, images)
        return self._scored[name, images]

    def _score(self, name: str, images: int) -> Ledger:
        reward = self.module.reward_models[name]
        prompts = [prompt for prompt in get_datamodule(self.trainer).training if reward.supports(prompt)]
        pixels, ledger = self.pixels(images), Ledger()
        if not prompts or not tensors_of(reward):  # a reward without weights hardly computes with torch
            return ledger
        try:
            copied = self.fakes.copy(reward)
            with self.fakes.counting() as ledger, torch.no_grad():
                copied.score(images=pixels.clone(), prompts=(prompts * images)[:images])
        except Exception as error:  # noqa: BLE001 - a reward may do anything; what it did until then is counted
            self.unknown[name] = error
        return ledger

    def statistics(self) -> Ledger:
        """The statistics of all the round's images."""
        pixels = self.pixels(self.images)
        with self.fakes.counting(pixels) as ledger, torch.no_grad():
            for statistic in PER_IMAGE.values():
                statistic(pixels)
        return ledger

    def train(self, images: int, refresh: bool, with_kl: bool) -> Ledger:
        """A micro-batch's forward and backward pass, with the gradients of earlier ones.

        Args:
            images: Images of the micro-batch.
            refresh: Whether it is the last one of a refresh, which takes most memory.
            with_kl: Whether it has a KL term.
        """
        with self.fakes.mode:
            gradients = [torch.empty_like(parameter) for parameter in self.trained]
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        if self.policy.transformer.is_gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing(self.fakes.checkpoint)
        step = TrainingStep(self.policy, self.module.objective, self.trained, self.module.gradient_passes)
        with self.fakes.counting(*self.encoding[0].tensors.values(), *gradients) as ledger:
            batch = self._micro_batch(images, len(self.module.balancer.names))
            with self._precision():
                old, base = step.frozen_velocities(batch, with_kl)
            with step.per_reward.capture() if refresh else nullcontext():
                self._forward(step, batch, refresh, old, base).backward()
        return ledger

    def _forward(self, step: TrainingStep, batch: MicroBatch, refresh: bool, old: Tensor, base: Tensor | None) -> Tensor:
        """The loss of a micro-batch; on a refresh with the memory of the gradients that are summed and merged."""
        with self._precision():
            parts = batch.coefficients
            if refresh and self.module.balancer.options.measure_signal:
                parts = parts.split(batch.in_first)
            if refresh:
                total = torch.empty(parts.plus.shape[1], sum(p.numel() for p in self.trained))
            plus, minus, kl = step.sample_losses_and_kl(batch, old, base)
            if not refresh:
                return batch.coefficients.losses(plus, minus).sum() + (0 if kl is None else kl)
            total += step.per_reward(plus, minus, parts, None)
            gram_matrix(total)
            step.merged.hold(torch.zeros_like(total[0]))
            return step.zero_loss() if kl is None else kl

    def _micro_batch(self, images: int, columns: int) -> MicroBatch:
        clean = self.latents(images).float()
        coefficients = Coefficients(torch.empty(images, columns), torch.empty(images, columns))
        halves = torch.empty(images, dtype=torch.bool)
        return MicroBatch(
            clean, torch.empty_like(clean), torch.empty(images), self._conditions(images), coefficients, halves
        )

    @cached_property
    def optimizer(self) -> tuple[int, int]:
        """Bytes of the optimizer's state, and those that a step takes beyond."""
        with self.fakes.mode:
            parameters = [nn.Parameter(torch.empty_like(parameter)) for parameter in self.trained]
            gradients = [torch.empty_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with self.fakes.counting(*parameters, *gradients) as ledger:
            optimizer = self.module.optimizer(parameters)
            for group in optimizer.param_groups:
                if self.fakes.cuda and group.get("foreach", 0) is None and not group.get("fused"):
                    group["foreach"] = True  # a GPU's default
            optimizer.step()
        state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
        return bytes_of(state), ledger.peak - bytes_of(state)

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision):
            return torch.autocast("cpu", torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16)
        return plugin.forward_context()
