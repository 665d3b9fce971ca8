"""What each phase of a run takes beyond what stays: run once on fake tensors, by the code that will run in earnest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from balancers import Balancer
from balancers.gramian import gram_matrix
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.image_statistics import PER_IMAGE
from marble_lightning.memory.ledger import CUDA_BLOCK, Fakes, Ledger, Once, bytes_of, tensors_of, text_encoders
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Coefficients
from marble_lightning.nft.reward_gradients import LinearTaps, RewardGradients
from marble_lightning.nft.rollout import MicroBatch
from marble_lightning.nft.step import TrainingStep
from marble_lightning.policies.base import Adapter, Conditions
from rewards import Reward


class _Unsolved(Balancer):
    """A balancer in the second micro-batch of a refresh, or of any other step, that looks at no number."""

    def __init__(self, names: Sequence[str], parameters: int, refresh: bool) -> None:
        super().__init__()
        self.refresh = refresh
        self.bind(names)
        self.begin_step(2)
        if refresh:
            self.add_gradients(torch.empty(len(names), parameters))

    @property
    def needs_gradients(self) -> bool:
        return self.refresh

    @property
    def loss_weights(self) -> Tensor:
        return torch.ones(len(self.names))

    def solve(self, reduce: Any, loss_scaled: bool = False) -> Tensor:
        gradients = self._sum.take()
        gram_matrix(gradients)
        return torch.zeros_like(gradients[0])


class _CountedStep(TrainingStep):
    """A training step whose passes without a graph, of the old and the reference policy, have been counted before."""

    def __init__(self, ledger: Ledger, without_graph: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ledger, self.without_graph = ledger, without_graph

    def velocity(self, batch: MicroBatch, adapter: Adapter | None) -> Tensor:
        if adapter == "trained":
            return super().velocity(batch, adapter)
        self.ledger.peak = max(self.ledger.peak, self.ledger.live + self.without_graph)
        return torch.empty_like(batch.clean)


class Phases:
    """Counts what phases take on this process's device, each once for the sizes asked for.

    Args:
        module: Set up for `fit`, with its trainer. Nothing of it is changed.
        dtype: Precision of the frozen weights; None leaves it as it is.
    """

    def __init__(self, module: DiffusionNFT, dtype: torch.dtype | None = None) -> None:
        self.module, self.trainer = module, module.trainer
        self.device = self.trainer.strategy.root_device
        self.block = CUDA_BLOCK if self.device.type == "cuda" else 1
        self.fakes = Fakes(self.block, cuda=self.device.type == "cuda")
        policy: Any = module.policy
        fixed = [policy.pipeline.vae] if policy.vae_dtype else []
        copied: Any = self.fakes.copy(policy, list(text_encoders(policy).values()), dtype, fixed)
        self.policy = copied
        if dtype is not None:
            self.policy.dtype = dtype
        vars(self.policy)["prompt_cache"] = None  # nothing may be looked up or kept
        self.trained = self.policy.parameters_of("trained")
        self.unknown: dict[str, Exception] = {}
        """What could not be counted, or in part only, and why."""
        self._taps: list[LinearTaps] = []
        self._counted: dict[tuple[Any, ...], int] = {}

    def bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that tensors take on this device."""
        return bytes_of(tensors, self.block)

    @cached_property
    def reward_models(self) -> dict[str, Reward]:
        """Rewards and metrics on this device."""
        places = self.module.scorer.settings.devices
        devices = {name: torch.device(places.get(name, self.device)) for name in self.module.reward_models}
        index = self.device.index or 0
        return {
            name: reward_model
            for name, reward_model in self.module.reward_models.items()
            if devices[name].type == self.device.type and (devices[name].index or index) == index
        }

    def latents(self, images: int, resolution: int | None = None) -> Tensor:
        """Latents of so many images, as sampling leaves them."""
        pipeline = self.policy.pipeline
        side = (resolution or self.policy.resolution) // pipeline.vae_scale_factor
        with self.fakes.mode:
            return torch.empty(images, pipeline.transformer.config.in_channels, side, side, dtype=self.policy.dtype)

    def decoded(self, images: int) -> Tensor:
        """So many decoded images."""
        with self.fakes.mode:
            return torch.empty(images, 3, self.policy.resolution, self.policy.resolution)

    def _once(self, count: Callable[[], int], *key: Any) -> int:
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    @cached_property
    def encoded(self) -> tuple[Conditions, int]:
        """The conditions of a round's prompts, and the bytes that encoding them takes."""
        prompts = self.module.plan.images // get_datamodule(self.trainer).images_per_prompt
        with self.fakes.counting() as ledger:
            conditions = self.policy.encode(["a"] * prompts)
        return conditions, ledger.peak

    def _conditions(self, images: int) -> Conditions:
        return self.encoded[0][torch.zeros(images, dtype=torch.long)]

    def sample(self, images: int, guided: bool = False, resolution: int | None = None) -> int:
        """Bytes to sample a batch: the network without gradients, beside what a solver of two steps' memory keeps.

        Args:
            images: Images of the batch.
            guided: Whether the empty prompt is beside each.
            resolution: Side of the images in pixels; None for the policy's.
        """
        largest = self.module.sampling.batch_size
        if not guided and not resolution and images < largest:  # no more than that, and need not be counted
            return self.sample(largest) * images // largest

        def count() -> int:
            with self.fakes.counting(*vars(self.encoded[0]).values()) as ledger, torch.no_grad(), self._precision():
                own = self._conditions(images)
                kept = [torch.empty_like(self.latents(images, resolution), dtype=torch.float32) for _ in range(3)]
                conditions = self._conditions(2 * images) if guided else own
                latents = self.latents(len(conditions.embeds), resolution)
                with self.policy.use_adapter("old"):
                    self.policy.velocity(latents, torch.empty(len(latents)), conditions)
                del own, kept
            return ledger.peak

        return self._once(count, "sample", images, guided, resolution)

    def decode(self, images: int, slicing: bool, mixed: bool = False, resolution: int | None = None) -> int:
        """Bytes to decode a batch.

        Args:
            images: Images of the batch.
            slicing: Whether they are decoded one by one.
            mixed: Whether in the trainer's precision.
            resolution: Side of the images in pixels; None for the policy's.
        """

        def count() -> int:
            vae, latents = self.policy.pipeline.vae, self.latents(images, resolution)
            before, vae.use_slicing = vae.use_slicing, slicing
            with self.fakes.counting(latents) as ledger, self._precision() if mixed else nullcontext():
                decoder, vae.decoder = vae.decoder, Once(vae.decoder, ledger)
                try:
                    self.policy.decode(latents)
                finally:
                    vae.decoder, vae.use_slicing = decoder, before
            return ledger.peak

        return self._once(count, "decode", images, slicing, mixed, resolution)

    def score(self, name: str, images: int) -> int:
        """Bytes that a reward takes beyond its weights, as far as it can be followed without data."""
        images = min(images, self.reward_models[name].batch_size)
        return self._once(lambda: self._score(name, images), "score", name, images)

    def _score(self, name: str, images: int) -> int:
        reward = self.reward_models[name]
        prompts = [prompt for prompt in get_datamodule(self.trainer).training if reward.supports(prompt)]
        if not prompts or not tensors_of(reward):  # whoever has no weights does not compute with torch, or next to nothing
            return 0
        chosen, pixels = (prompts * images)[:images], self.decoded(images)
        ledger = Ledger()
        try:
            faked = self.fakes.copy(reward)
            with self.fakes.counting() as ledger, torch.no_grad():
                faked.score(images=pixels.clone(), prompts=chosen)
        except Exception as error:  # noqa: BLE001 - a reward may do anything; what it did until then is counted
            self.unknown[name] = error
        return ledger.peak

    @cached_property
    def statistics(self) -> int:
        """Bytes that the statistics of all the round's images take."""
        pixels = self.decoded(self.module.plan.images)
        with self.fakes.counting(pixels) as ledger, torch.no_grad():
            for statistic in PER_IMAGE.values():
                statistic(pixels)
        return ledger.peak

    def step(self, images: int, checkpointing: bool, refresh: bool | None = None) -> int:
        """Bytes of one micro-batch's forward and backward pass, gradients of earlier ones being there.

        Args:
            images: Images of the micro-batch.
            checkpointing: Whether blocks are recomputed in the backward pass.
            refresh: Whether per-reward gradients are asked for, which takes more; None: where the balancer ever does.
        """
        refresh = self.module.balancer.needs_gradients if refresh is None else refresh
        return self._once(lambda: self._count_step(images, checkpointing, refresh), "step", images, checkpointing, refresh)

    def _count_step(self, images: int, checkpointing: bool, refresh: bool) -> int:
        sampling = self.module.sampling.batch_size
        without_graph = self.sample(sampling) * images // sampling  # the network for the old and the reference policy
        with self.fakes.mode:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        given = (*vars(self.encoded[0]).values(), *gradients)
        if checkpointing:
            self.policy.transformer.enable_gradient_checkpointing(self.fakes.checkpoint)
        else:
            self.policy.transformer.disable_gradient_checkpointing()
        with self._without_taps(), self.fakes.counting(*given) as ledger:
            names = self.module.balancer.names
            balancer = _Unsolved(names, sum(parameter.numel() for parameter in self.trained), refresh)
            step = self._step(ledger, without_graph, refresh)
            with self._precision():
                loss, _ = step(self._micro_batch(images, len(names)), balancer, 1, lambda mean: mean, None)
            loss.backward()
        return ledger.peak

    @contextmanager
    def _without_taps(self) -> Iterator[None]:
        """Switch off taps that came with the copied layers, from the module or an earlier count."""
        own: RewardGradients | None = vars(self.module.step).get("per_reward")
        taps = [*self._taps, *([own.taps] if own and own.taps else [])]
        before = [each.on for each in taps]
        try:
            for each in taps:
                each.on = False
            yield
        finally:
            for each, on in zip(taps, before, strict=True):
                each.on = on

    def _step(self, ledger: Ledger, without_graph: int, refresh: bool) -> TrainingStep:
        """The training step of the fake policy."""
        settings = (self.policy, self.module.objective, self.trained, self.module.gradient_passes)
        step = _CountedStep(ledger, without_graph, *settings)
        if refresh:
            self._taps += [step.per_reward.taps] if step.per_reward.taps else []
            vars(step.per_reward)["set_capture"] = lambda _: None  # taps are on, and nothing is compiled
        return step

    def _micro_batch(self, images: int, columns: int) -> MicroBatch:
        clean = self.latents(images).float()
        coefficients = Coefficients(torch.empty(images, columns), torch.empty(images, columns))
        return MicroBatch(clean, torch.empty_like(clean), torch.empty(images), self._conditions(images), coefficients)

    @cached_property
    def optimizer(self) -> tuple[int, int]:
        """Bytes of the optimizer's state, and those a step takes beyond."""
        try:
            with self.fakes.mode:
                parameters = [nn.Parameter(torch.empty_like(parameter)) for parameter in self.trained]
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
            given = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
            with self.fakes.counting(*given) as ledger:
                optimizer = self.module.optimizer(parameters)
                for group in optimizer.param_groups:
                    if self.fakes.cuda and group.get("foreach", 0) is None and not group.get("fused"):
                        group["foreach"] = True  # a GPU's default
                optimizer.step()
            state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
            return self.bytes(state), ledger.peak - self.bytes(state)
        except Exception as error:  # noqa: BLE001 - any optimizer may be named
            self.unknown["optimizer"] = error
            return 2 * self.bytes(self.trained), 0  # AdamW's

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision):
            return torch.autocast("cpu", torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16)
        return plugin.forward_context()
