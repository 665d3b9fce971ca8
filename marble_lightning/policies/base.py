"""What training and evaluation ask of a text-to-image flow model, and the three LoRA adapters that any such model has."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from marble_lightning.policies.lora import Lora
from marble_lightning.policies.samplers import Solver
from marble_lightning.utils.seeds import derived_seed

Adapter = Literal["trained", "old", "ema"]
ADAPTERS: tuple[Adapter, ...] = ("trained", "old", "ema")
"""`trained` learns, `old` samples the rollouts, `ema` is the average that is evaluated and exported."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts: `embeds` (B, tokens, width) and `pooled` (B, pooled width)."""

    embeds: Float[Tensor, "batch token width"]
    pooled: Float[Tensor, "batch pooled"]

    def __getitem__(self, index: Int[Tensor, " chosen"]) -> Conditions:
        return Conditions(self.embeds[index], self.pooled[index])


def joined(rows: Sequence[Conditions], device: torch.device) -> Conditions:
    """Batches of encoded prompts as one, on a device."""
    embeds, pooled = (torch.cat([getattr(row, part).to(device) for row in rows]) for part in ("embeds", "pooled"))
    return Conditions(embeds, pooled)


class FlowPolicy(nn.Module, ABC):
    """A text-to-image flow model with a frozen base and the LoRA adapters `trained`, `old` and `ema`.

    The seam for another model: a subclass loads it and answers the abstract methods, and nothing else of the project knows
    which model it is. Images are latents of any shape (B, ...); flow time t runs from 1, noise, to 0, an image, along
    x_t = (1 - t) x_0 + t eps, and velocity is d x_t / d t = eps - x_0.

    Args:
        path: Where the model is loaded from.
        revision: Which version of it, or None.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Linear layers of `transformer` that get a LoRA: those whose name is, or ends with a dot and, one of these.
    """

    transformer: Any
    """The network that predicts velocities, an `nn.Module`; `setup` sets it and calls `add_adapters`."""
    resolution: int
    """Side of the images in pixels."""
    adapter: Adapter | None = "ema"
    """The adapter that is judged; with None there are no adapters, and the base is judged."""
    init_lora: str | None = None
    """What the adapters start as, where that is not the base."""
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

    # For a model to answer ------------------------------------------------------------------------------------------

    @abstractmethod
    def setup(self, seed: int) -> None:
        """Load the model, freeze it and add the adapters; the same seed gives the same ones. Called often, works once.

        Raises:
            ValueError: The model is not one that this class can train.
        """

    def check(self) -> None:
        """Refuse settings that can be refused before any weight loads. Default: nothing."""

    @abstractmethod
    def check_resolution(self, name: str, resolution: int) -> None:
        """Refuse images of a size that the model cannot draw, before any weight loads.

        Args:
            name: Of the setting.
            resolution: Side in pixels.

        Raises:
            ValueError: With the sizes that it can.
        """

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Tokens that are read of a prompt, as `truncated_prompts` counts them."""

    @abstractmethod
    def truncated_prompts(self, texts: Iterable[str]) -> list[str]:
        """Those texts whose end the model does not read."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts, on the transformer's device, without a graph. What a prompt becomes depends on it alone."""

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
    ) -> Float[Tensor, "batch *latent"]:
        """Sample latents without a graph, one generator per image.

        Args:
            conditions: Encoded prompts, one per image.
            generators: CPU generators of the initial noise.
            adapter: Adapter to sample with; None samples the base.
            steps: Steps of the solver, which visits `sigmas(steps)`.
            solver: `dpm2` or `euler`.
            guidance: Classifier-free guidance scale; 1 is none.
            unconditional: The encoded empty prompt (batch of one), needed where guidance > 1.
            resolution: Side of the images in pixels; None for the policy's.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch 3 pixel pixel"]:
        """Images in [0, 1], float32, of latents."""

    @abstractmethod
    def velocity(
        self, noisy: Float[Tensor, "batch *latent"], t: Float[Tensor, " batch"], conditions: Conditions
    ) -> Float[Tensor, "batch *latent"]:
        """Velocity at x_t of the adapter in use; t in (0, 1]. Float32, with a graph where gradients are on."""

    @abstractmethod
    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Flow times a rollout of that many steps visits, from 1 down, without the final 0."""

    # Adapters -------------------------------------------------------------------------------------------------------

    def add_adapters(self, seed: int, start: Lora | None = None) -> None:
        """Give the transformer its adapters, all equal and in float32, of which `trained` is in use and trainable.

        Args:
            seed: Seed of A, where they start at the base: with B zero.
            start: What they start as instead.
        """
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, init_lora_weights="gaussian", target_modules=list(self.targets)
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three adapters are the point
            torch.manual_seed(derived_seed(seed, "lora"))
            for name in ADAPTERS if self.adapter else ():
                self.transformer.add_adapter(config, name)
        layers = {name: module for name, module in self.transformer.named_modules() if isinstance(module, LoraLayer)}
        if unknown := [
            own for own in self.targets if self.adapter and not any(f".{name}".endswith(f".{own}") for name in layers)
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
        """What its images depend on besides adapters and sampling, by name: the model; a subclass adds what it must."""
        return {"model": self.path, "revision": self.revision}

    @property
    def lora(self) -> dict[str, object]:
        """What a checkpoint's adapters must have been trained with to fit."""
        return {"rank": self.rank, "alpha": float(self.alpha), "targets": list(self.targets)}

    def parameters_of(self, adapter: Adapter) -> list[nn.Parameter]:
        """The parameters of one adapter, in a fixed order."""
        return [parameter for name, parameter in self.transformer.named_parameters() if f".{adapter}." in name]

    @torch.no_grad()
    def lerp_adapter(self, adapter: Adapter, *, towards: Adapter, by: float) -> None:
        """Move one adapter a share `by` in [0, 1] of the way to another."""
        for own, goal in zip(self.parameters_of(adapter), self.parameters_of(towards), strict=True):
            own.lerp_(goal, by)

    @contextmanager
    def use_adapter(self, adapter: Adapter | None) -> Iterator[None]:
        """Run the transformer with one adapter, or with none (the reference policy).

        Where gradients are off and all is float32, the adapter is merged into the weights for as long: the same velocities
        up to rounding, at the price of the base's. In half precision W + B A would round a small B A away.

        Raises:
            RuntimeError: One is in use already.
        """
        if self._in_use:
            raise RuntimeError("`use_adapter` must not be nested: leave one adapter before the next. Found one in use.")
        weights = self._mergeable(adapter)
        own = [weight.data for weight in weights]
        self._in_use = True
        try:
            for layer, weight in zip(self._lora_layers if weights else (), weights, strict=True):
                weight.data = weight.data + layer.get_delta_weight(adapter)
            self._activate(None if weights else adapter)
            yield
        finally:
            self._in_use = False
            for weight, data in zip(weights, own, strict=True):  # subtracting again would leave a rounding behind
                weight.data = data
            self._activate("trained")

    def _mergeable(self, adapter: Adapter | None) -> list[nn.Parameter]:
        """The weights to merge an adapter into, one per LoRA layer; none where it must stay apart."""
        half = torch.is_autocast_enabled(self.device.type) or torch.get_float32_matmul_precision() != "highest"
        if adapter is None or half or torch.is_grad_enabled():
            return []
        weights = [layer.get_base_layer().weight for layer in self._lora_layers]
        return weights if all(weight.dtype == torch.float32 for weight in weights) else []

    def _activate(self, adapter: Adapter | None) -> None:
        # peft's own switches also flip requires_grad, which would cut DistributedDataParallel's gradient hooks
        for layer in self._lora_layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or "trained"]

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        found: torch.device = self.transformer.device
        return found
