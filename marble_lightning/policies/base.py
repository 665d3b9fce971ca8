"""The interface of a text-to-image flow model for training and evaluation, and its three LoRA adapters."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from marble_lightning.policies.lora import Lora
from marble_lightning.policies.samplers import Solver
from marble_lightning.utils.seeds import derived_seed

Adapter = Literal["trained", "old", "ema"]
ADAPTERS: tuple[Adapter, ...] = ("trained", "old", "ema")
"""`trained` is trained, `old` samples the rollouts, `ema` is the average that is evaluated and exported."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts, one in each row.

    Args:
        embeds: A vector of each token, (B, tokens, width); rows of shorter prompts end with zeros.
        pooled: A vector of each prompt, (B, pooled width); None if the model uses none.
        lengths: Number of tokens of each prompt, (B,), int64; None if all tokens count.
    """

    embeds: Float[Tensor, "batch token width"]
    pooled: Float[Tensor, "batch pooled"] | None = None
    lengths: Int[Tensor, " batch"] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def __getitem__(self, index: Int[Tensor, " chosen"] | slice) -> Conditions:
        return Conditions(**{name: tensor[index] for name, tensor in self.tensors.items()})

    def split(self) -> list[Conditions]:
        """The prompts one by one, as batches of one without zeros at the end, on the CPU."""
        on_cpu = Conditions(**{name: tensor.cpu() for name, tensor in self.tensors.items()})
        rows = [on_cpu[index : index + 1] for index in range(len(self.embeds))]
        return [row if row.lengths is None else replace(row, embeds=row.embeds[:, : int(row.lengths)]) for row in rows]


def concat_conditions(rows: Sequence[Conditions], device: torch.device) -> Conditions:
    """Batches of encoded prompts joined into one batch on a device; shorter ones are filled up with zeros."""
    parts = {name: [row.tensors[name].to(device) for row in rows] for name in rows[0].tensors}
    longest = max(embeds.shape[1] for embeds in parts["embeds"])
    if any(embeds.shape[1] < longest for embeds in parts["embeds"]):
        parts["embeds"] = [pad(embeds, (0, 0, 0, longest - embeds.shape[1])) for embeds in parts["embeds"]]
    return Conditions(**{name: torch.cat(tensors) for name, tensors in parts.items()})


class FlowPolicy(nn.Module, ABC):
    """A text-to-image flow model with a frozen base and the LoRA adapters `trained`, `old` and `ema`.

    For another model, write a subclass that loads it and implements the abstract methods; the rest of the project does not
    depend on the model. Latents have any shape (B, ...). Flow time t runs from 1 (noise) to 0 (image) along
    x_t = (1 - t) x_0 + t eps, and the velocity is d x_t / d t = eps - x_0.

    Args:
        path: Folder or hub id from which the model is loaded.
        revision: Revision of a hub id, or None.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Linear layers of `transformer` that get a LoRA: a layer's name is one of these, or ends with a dot and one
            of these.
    """

    transformer: Any
    """The network that predicts velocities, an `nn.Module`; `setup` sets it and calls `add_adapters`."""
    resolution: int
    """Side of the images in pixels."""
    adapter: Adapter | None = "ema"
    """The adapter that is evaluated; with None there are no adapters, and the base model is evaluated."""
    init_lora: str | None = None
    """The LoRA that the adapters start from; None starts them at the base model."""
    sharded = False
    """Whether processes share the frozen weights of the transformer; see `ShardedBaseStrategy`."""
    _in_use = False

    def __init__(self, path: str, revision: str | None, rank: int, alpha: float, targets: Sequence[str]) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`policy.rank` must be >= 1. Found {rank}.")
        if not 0 < alpha < inf:
            raise ValueError(f"`policy.alpha` must be > 0 and finite. Found {alpha}.")
        if not targets:
            raise ValueError("`policy.targets` must name at least one linear layer. Found none.")
        self.path, self.revision = path, revision
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)

    # Methods that a subclass implements -----------------------------------------------------------------------------

    @abstractmethod
    def setup(self, seed: int) -> None:
        """Load the model, freeze it and add the adapters, equal for equal seeds. Only the first call has an effect.

        Raises:
            ValueError: This class cannot train the model.
        """

    def check(self) -> None:
        """Check the settings that can be checked before any weight loads. Default: no check."""

    @abstractmethod
    def check_resolution(self, name: str, resolution: int) -> None:
        """Check that the model can generate images of a size, before any weight loads.

        Args:
            name: Name of the setting, for the error message.
            resolution: Side of the images in pixels.

        Raises:
            ValueError: The model cannot; the message names the sizes that it can generate.
        """

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt before it is truncated, as `truncated_prompts` counts them."""

    @abstractmethod
    def truncated_prompts(self, texts: Iterable[str]) -> list[str]:
        """The texts that the model truncates."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts on the transformer's device, without a graph. Other prompts do not affect an encoding."""

    def encode_longest(self, prompts: int) -> Conditions:
        """Encode so many of the longest prompts; the memory estimate runs it on tensors without data."""
        return self.encode(["a"] * prompts)  # a subclass whose encodings have different lengths overrides it

    @abstractmethod
    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        adapter: Adapter | None,
        *,
        steps: int,
        solver: Solver,
        guidance: float = 1.0,
        unconditional: Conditions | None = None,
        resolution: int | None = None,
    ) -> Float[Tensor, " batch *latent"]:
        """Sample latents without a graph, one generator per image.

        Args:
            conditions: Encoded prompts, one per image.
            generators: CPU generators of the initial noise.
            adapter: Adapter to sample with; None samples with the base model.
            steps: Steps of the solver, at the flow times `sigmas(steps)`.
            solver: `dpm2` or `euler`.
            guidance: Scale of classifier-free guidance; 1 disables it.
            unconditional: The encoded empty prompt (batch of one), required if guidance > 1.
            resolution: Side of the images in pixels; None for the policy's resolution.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, " batch *latent"]) -> Float[Tensor, "batch 3 pixel pixel"]:
        """Decode latents to images in [0, 1], float32."""

    @abstractmethod
    def velocity(
        self, noisy: Float[Tensor, " batch *latent"], t: Float[Tensor, " batch"], conditions: Conditions
    ) -> Float[Tensor, " batch *latent"]:
        """Velocity at x_t with the adapter in use; t in (0, 1]. Float32, with a graph if gradients are enabled."""

    @abstractmethod
    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Flow times of a rollout with `steps` steps, in descending order from 1, without the final 0."""

    # Adapters -------------------------------------------------------------------------------------------------------

    def add_adapters(self, seed: int, start: Lora | None = None) -> None:
        """Add the three adapters to the transformer, equal and in float32; `trained` is in use and trainable.

        Args:
            seed: Seed of the matrices A if the adapters start at the base model, with B zero.
            start: The LoRA that the adapters start from instead.

        Raises:
            ValueError: A target names no linear layer of the transformer, or `start` does not fit.
        """
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, init_lora_weights="gaussian", target_modules=list(self.targets)
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three adapters are intended
            torch.manual_seed(derived_seed(seed, "lora"))
            for name in ADAPTERS if self.adapter else ():
                self.transformer.add_adapter(config, name)
        layers = {name: module for name, module in self.transformer.named_modules() if isinstance(module, LoraLayer)}
        if unknown := [
            target
            for target in self.targets
            if self.adapter and not any(f".{name}".endswith(f".{target}") for name in layers)
        ]:
            raise ValueError(
                f"`policy.targets` must name linear layers of the transformer. Found no {unknown[0]!r} in {self.path}."
            )
        self._lora_layers = list(layers.values())
        for name in ADAPTERS:
            for parameter in self.parameters_of(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == "trained")
        if start is not None:
            start.copy_to(self.transformer, "trained")
        for name in ADAPTERS:
            self.lerp_adapter(name, towards="trained", by=1.0)
        self._activate("trained")

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Settings of the model that change its images, by name, without adapters and sampling; a subclass adds more."""
        return {"model": self.path, "revision": self.revision}

    @property
    def lora(self) -> dict[str, object]:
        """LoRA settings, which must equal those of a checkpoint that is loaded."""
        return {"rank": self.rank, "alpha": float(self.alpha), "targets": list(self.targets)}

    def parameters_of(self, adapter: Adapter) -> list[nn.Parameter]:
        """The parameters of one adapter, in a fixed order."""
        return [parameter for name, parameter in self.transformer.named_parameters() if f".{adapter}." in name]

    @torch.no_grad()
    def lerp_adapter(self, adapter: Adapter, *, towards: Adapter, by: float) -> None:
        """Interpolate one adapter towards another by a share `by` in [0, 1]."""
        for parameter, goal in zip(self.parameters_of(adapter), self.parameters_of(towards), strict=True):
            parameter.lerp_(goal, by)

    @contextmanager
    def use_adapter(self, adapter: Adapter | None) -> Iterator[None]:
        """Run the transformer with one adapter, or with none (the base model).

        If gradients are disabled and all weights are float32, the adapter is merged into the weights meanwhile: the
        velocities are equal up to rounding, at the cost of the base model. In half precision, rounding in W + B A would
        lose a small B A.

        Raises:
            RuntimeError: An adapter is already in use.
        """
        if self._in_use:
            raise RuntimeError("`use_adapter` must not be nested: leave one adapter before the next. Found one in use.")
        weights = self._mergeable(adapter)
        unmerged = [weight.data for weight in weights]
        self._in_use = True
        try:
            for layer, weight in zip(self._lora_layers if weights else (), weights, strict=True):
                weight.data = weight.data + layer.get_delta_weight(adapter)
            self._activate(None if weights else adapter)
            yield
        finally:
            self._in_use = False
            for weight, data in zip(weights, unmerged, strict=True):  # subtracting the update would add rounding errors
                weight.data = data
            self._activate("trained")

    def _mergeable(self, adapter: Adapter | None) -> list[nn.Parameter]:
        """The weights to merge an adapter into, one per LoRA layer; empty if the adapter must stay separate."""
        half = torch.is_autocast_enabled(self.device.type) or torch.get_float32_matmul_precision() != "highest"
        if adapter is None or half or self.sharded or torch.is_grad_enabled():
            return []
        weights = [layer.get_base_layer().weight for layer in self._lora_layers]
        return weights if all(weight.dtype == torch.float32 for weight in weights) else []

    def _activate(self, adapter: Adapter | None) -> None:
        # peft's own methods also change requires_grad, which would disable DistributedDataParallel's gradient hooks
        for layer in self._lora_layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or "trained"]

    @property
    def device(self) -> torch.device:
        """The device of the transformer."""
        return next(self.transformer.parameters()).device  # diffusers' own property walks through all modules
