"""How much memory a run needs, part by part and phase by phase, at the settings it has and at others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.memory.ledger import tensors_of, text_encoders
from marble_lightning.memory.phases import Phases
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.base import ADAPTERS


@dataclass(frozen=True)
class Choices:
    """Settings that memory depends on, as they are or as they might be.

    Args:
        micro_batch_size: Images of one forward and backward pass.
        sampling_batch_size: Images sampled and decoded at once.
        held_out_batch_size: The same of held-out prompts; 0 where none are sampled.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass.
        text_encoders_stay: Whether text encoders are on the device also when nothing is encoded.
        vae_slicing: Whether images are decoded one by one.
        overlap: Whether images are scored while the next ones are sampled.
        rewards_stay: Whether rewards are on the device also during training.
        dtype: Precision of the frozen weights.
    """

    micro_batch_size: int
    sampling_batch_size: int
    held_out_batch_size: int
    gradient_checkpointing: bool
    text_encoders_stay: bool
    vae_slicing: bool
    overlap: bool
    rewards_stay: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, module: DiffusionNFT) -> Choices:
        """As a module that is set up for `fit` has them."""
        policy: Any = module.policy
        trainer = module.trainer
        own = {id(tensor) for tensor in tensors_of(policy)}
        visitors = [tensor for tensor in tensors_of(*text_encoders(policy).values()) if id(tensor) not in own]
        on_cpu = trainer.strategy.root_device.type == "cpu"  # where those who wait, wait on the same device
        evaluates = bool(trainer.limit_val_batches and trainer.check_val_every_n_epoch)
        return cls(
            micro_batch_size=module.plan.batch_size,
            sampling_batch_size=module.sampling.batch_size,
            held_out_batch_size=get_datamodule(trainer).held_out_batch_size if evaluates else 0,
            gradient_checkpointing=bool(policy.transformer.is_gradient_checkpointing),
            text_encoders_stay=on_cpu or not visitors,
            vae_slicing=policy.pipeline.vae.use_slicing,
            overlap=module.scorer.settings.overlap,
            rewards_stay=on_cpu or not module.scorer.settings.offload,
            dtype=policy.dtype,
        )

    def others(self, module: DiffusionNFT) -> dict[str, dict[str, Any]]:
        """Changes that may save memory, each alone, by how the command line spells them; those that cost least first."""
        policy, plan = module.policy, module.plan
        switches = {
            "model.policy.offload_text_encoders true": ("text_encoders_stay", False),
            "model.policy.vae_slicing true": ("vae_slicing", True),
            "model.scoring.offload true": ("rewards_stay", False),
            "model.scoring.overlap false": ("overlap", False),
            "model.policy.dtype bfloat16": ("dtype", torch.bfloat16 if self.dtype == torch.float32 else self.dtype),
            "model.policy.gradient_checkpointing true": ("gradient_checkpointing", True),
        }
        found = {name: {field: value} for name, (field, value) in switches.items() if getattr(self, field) != value}
        found = {name: change for name, change in found.items() if "policy" not in name or _has(policy, name)}
        for name, field, whole in (
            ("model.sampling.batch_size", "sampling_batch_size", None),
            ("data.held_out_batch_size", "held_out_batch_size", None),
            ("model.micro_batch_size", "micro_batch_size", plan.images // plan.optimizer_steps),
        ):
            found |= {f"{name} {size}": {field: size} for size in smaller(getattr(self, field), whole)}
        return found


def _has(policy: object, name: str) -> bool:
    return hasattr(policy, name.split()[0].removeprefix("model.policy."))


def smaller(size: int, divides: int | None = None) -> list[int]:
    """About a half and a quarter of a batch, and 1.

    >>> smaller(9), smaller(12, divides=90), smaller(1)
    ([4, 2, 1], [6, 3, 1], [])
    """
    allowed = [each for each in range(1, size) if divides is None or divides % each == 0]
    wanted = [max(size // by, 1) for by in (2, 4, size)] if allowed else []
    return sorted({max(each for each in allowed if each <= most) for most in wanted}, reverse=True)


class Phase(NamedTuple):
    """What is on the device during a phase: `parts` by name, and at most `beyond` bytes more."""

    parts: tuple[str, ...]
    beyond: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    Args:
        parts: What stays through a phase, by name.
        phases: What a run does, by name.
        unknown: What could not be counted, or in part only, and why.
    """

    parts: Mapping[str, int]
    phases: Mapping[str, Phase]
    unknown: Mapping[str, Exception]

    def total(self, phase: str) -> int:
        """The most there is in one phase."""
        return sum(self.parts[name] for name in self.phases[phase].parts) + self.phases[phase].beyond

    @property
    def peak(self) -> int:
        """The most there is in any."""
        return max(map(self.total, self.phases))

    def above(self, limit: float) -> float:
        """By how many bytes phases pass a limit, together: 0 where all fit."""
        return sum(max(0, self.total(phase) - limit) for phase in self.phases)


class Estimator:
    """Estimates a module's memory at any settings; what was counted once is not counted again.

    Args:
        module: Set up for `fit`, with its trainer.
    """

    def __init__(self, module: DiffusionNFT) -> None:
        self.module = module
        self._worlds: dict[torch.dtype, tuple[Phases, dict[str, int]]] = {}

    def __call__(self, choices: Choices) -> Estimate:
        """The memory at these settings."""
        if choices.dtype not in self._worlds:
            policy: Any = self.module.policy
            phases = Phases(self.module, None if choices.dtype == policy.dtype else choices.dtype)
            self._worlds[choices.dtype] = phases, parts_of(phases)
        counted, parts = self._worlds[choices.dtype]
        visiting = ("text encoders", "rewards", "rewards elsewhere", "images")
        always = tuple(name for name in parts if name not in visiting)
        encoders = ("text encoders",) if choices.text_encoders_stay else ()
        sampling = (*always, *encoders, "rewards", "images")
        resting = (*always, *(("rewards",) if choices.rewards_stay else ()))
        training = (*resting, *encoders)
        batch, slicing = choices.sampling_batch_size, choices.vae_slicing
        sample, decode = counted.sample(batch), counted.decode(batch, slicing)

        def score(images: int) -> int:
            each = [counted.score(name, images) for name in counted.reward_models]
            return sum(each) if choices.overlap else max(each, default=0)

        found = {
            "loading weights": Phase(
                ("transformer", "adapters", "autoencoder", *encoders, "rewards", "rewards elsewhere"), 0
            ),
            "encoding prompts": Phase((*resting, "text encoders"), counted.encoded[1]),
            "sampling": Phase(sampling, sample),
            "decoding": Phase(sampling, decode),
            "scoring": Phase(sampling, score(batch) + (max(sample, decode) if choices.overlap else 0)),
            "image statistics": Phase((*training, "images"), counted.statistics),
            "training": Phase(training, counted.step(choices.micro_batch_size, choices.gradient_checkpointing)),
            "optimizer step": Phase(training, counted.optimizer[1]),
        }
        if held_out := choices.held_out_batch_size:
            guided, resolution = self.module.evaluator.evaluation.guidance > 1, self.module.evaluator.evaluation.resolution
            sample = counted.sample(held_out, guided, resolution)
            decode = counted.decode(held_out, slicing, mixed=True, resolution=resolution)
            beyond = max(sample, decode, score(held_out))  # one after the other
            found["held-out prompts"] = Phase((*always, *encoders, "rewards"), beyond)
        return Estimate(parts, found, dict(counted.unknown))


def parts_of(phases: Phases) -> dict[str, int]:
    """Bytes of what stays on the device, for a while at least, by name."""
    policy, module, ranks = phases.policy, phases.module, phases.trainer.world_size
    adapters = [parameter for name in ADAPTERS for parameter in policy.parameters_of(name)]
    vae, encoders = policy.pipeline.vae, text_encoders(policy)
    apart = {id(tensor) for tensor in (*adapters, *tensors_of(vae, *encoders.values()))}
    reward_models = tensors_of(*phases.reward_models.values())
    here = {id(tensor) for tensor in reward_models}
    elsewhere = [tensor for tensor in tensors_of(*module.reward_models.values()) if id(tensor) not in here]
    conditions = phases.encoded[0]
    return {
        "transformer": phases.bytes([tensor for tensor in tensors_of(policy) if id(tensor) not in apart]),
        "adapters": phases.bytes(adapters),
        "gradients": phases.bytes(phases.trained) * (1 if ranks == 1 else 2),  # and DistributedDataParallel's buckets
        "optimizer": phases.optimizer[0],
        "autoencoder": phases.bytes(tensors_of(vae)),
        "text encoders": phases.bytes(tensors_of(*encoders.values())),
        "rewards": phases.bytes(reward_models),
        "rewards elsewhere": phases.bytes(elsewhere),
        "latents and prompts": phases.bytes([phases.latents(module.plan.images), conditions.embeds, conditions.pooled]),
        "images": phases.bytes([phases.decoded(module.plan.images)]),
    }
