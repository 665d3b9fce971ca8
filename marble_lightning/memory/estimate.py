"""How much GPU memory a run needs, part by part and phase by phase, and how much a round computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.memory.ledger import Ledger, bytes_of, tensors_of
from marble_lightning.memory.phases import Phases
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.rollout import Plan
from marble_lightning.policies.base import ADAPTERS, FlowPolicy, is_adapter
from marble_lightning.policies.sharding import blocks_of

GATHERED = 3
"""Whole blocks of a sharded transformer at most: the one that runs, its buffer of the gathering, and that of the next."""


class Phase(NamedTuple):
    """What is on the device during a phase: `parts` by name, and at most `beyond` bytes more.

    `flops` are the floating-point operations of the phase in one round; 0 outside rounds.
    """

    parts: tuple[str, ...]
    beyond: int
    flops: float = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    Args:
        parts: What stays through a phase, by name.
        phases: What a run does, by name.
        unknown: Rewards that could not be counted, or in part only, and why.
    """

    parts: Mapping[str, int]
    phases: Mapping[str, Phase]
    unknown: Mapping[str, Exception]

    def total(self, phase: str) -> int:
        """The most there is in one phase."""
        return sum(self.parts[name] for name in self.phases[phase].parts) + self.phases[phase].beyond

    @property
    def peak(self) -> int:
        """The most there is in any phase."""
        return max(map(self.total, self.phases))

    @property
    def flops(self) -> float:
        """Floating-point operations of a round on this device."""
        return sum(phase.flops for phase in self.phases.values())


def estimate_memory(module: DiffusionNFT, gpus: int = 1, cuda: bool = True, shards: int = 1) -> Estimate:
    """Estimate the memory of one process's device. Every phase is counted once, which takes seconds.

    Args:
        module: Set up for `fit`, with its trainer. It does not change.
        gpus: Processes of the run, one for each GPU. A trainer with fewer processes has their images too.
        cuda: Whether to count for a GPU; tests count for a CPU.
        shards: Processes that share the transformer's weights, see `ShardedBaseStrategy`.

    Raises:
        ValueError: A process's images cannot be split into whole micro-batches and optimizer steps.
    """
    plan = replace(module.plan, images=module.plan.images * module.trainer.world_size // gpus)
    count = Phases(module, plan.images, cuda)
    policy: Any = module.policy
    parts = parts_of(count, gpus, shards)
    encoders = () if policy.offload_text_encoders else ("text encoders",)
    always = tuple(name for name in parts if name not in ("gathered blocks", "text encoders", "rewards", "images"))
    working = (*always, *encoders, "gathered blocks")
    scoring, overlap = module.scorer.settings, module.scorer.settings.overlap
    resting = (*always, *(() if scoring.offload else ("rewards",)))
    sampling, training = (*working, "rewards", "images"), (*resting, *encoders, "gathered blocks")

    batch, sampled = module.sampling.batch_size, plan.images / module.sampling.batch_size
    here = on_this_gpu(module)
    encode, sample, decode = count.encoding[1], count.sample(batch), count.decode(batch)
    score = {name: count.score(name, batch) for name in here if name in module.rewards}
    scoring_bytes = [found.peak for found in score.values()]
    together = sum(scoring_bytes) + max(sample.peak, decode.peak) if overlap else max(scoring_bytes, default=0)
    statistics, (train_bytes, train_flops) = count.statistics(), training_cost(module, count, plan)
    phases = {
        "loading weights": Phase(("transformer", "adapters", "autoencoder", *encoders), 0),
        "encoding prompts": Phase((*resting, "text encoders"), encode.peak, encode.flops),
        "sampling": Phase(sampling, sample.peak, sample.flops * module.sampling.steps * sampled),
        "decoding": Phase(sampling, decode.peak, decode.flops * sampled),
        "scoring": Phase(sampling, together, scoring_flops(module, score, plan)),
        "image statistics": Phase((*training, "images"), statistics.peak, statistics.flops),
        "training": Phase(training, train_bytes, train_flops),
        "optimizer step": Phase(training, count.optimizer[1]),
    }
    trainer = module.trainer
    if trainer.limit_val_batches and trainer.check_val_every_n_epoch:
        held_out, evaluation = get_datamodule(trainer).held_out_batch_size, module.evaluator.evaluation
        sample = count.sample(held_out, evaluation.guidance > 1, evaluation.resolution)
        decode = count.decode(held_out, evaluation.resolution)
        scoring_bytes, beside = [count.score(name, held_out).peak for name in here], max(sample.peak, decode.peak)
        most = sum(scoring_bytes) + beside if overlap else max([beside, *scoring_bytes])  # there may be none here
        phases["held-out prompts"] = Phase((*working, "rewards"), most)
    return Estimate(parts, phases, dict(count.unknown))


def training_cost(module: DiffusionNFT, count: Phases, plan: Plan) -> tuple[int, float]:
    """The most bytes that a micro-batch takes, and the floating-point operations of all micro-batches of a round."""

    def count_kind(refresh: bool) -> tuple[int, float]:
        """The peak, with a KL term, and the mean operations of micro-batches with and without one."""
        objective = module.objective
        found = count.train(plan.batch_size, refresh, with_kl=objective.kl_weight > 0)
        if objective.kl_every == 1:
            return found.peak, found.flops
        without = count.train(plan.batch_size, refresh, with_kl=False)
        return found.peak, without.flops + (found.flops - without.flops) / objective.kl_every

    plain_bytes, plain_flops = count_kind(refresh=False)
    if not module.balancer.needs_gradients:
        return plain_bytes, plan.total * plain_flops
    options, (refresh_bytes, refresh_flops) = module.balancer.options, count_kind(refresh=True)
    share = options.estimated(plan.per_step) / plan.per_step / options.refresh_every
    return refresh_bytes, plan.total * (share * refresh_flops + (1 - share) * plain_flops)


def scoring_flops(module: DiffusionNFT, counted: Mapping[str, Ledger], plan: Plan) -> float:
    """Floating-point operations to score the images of a round, each by the rewards that support its prompt."""
    data, total = get_datamodule(module.trainer), 0.0
    for name, found in counted.items():
        reward = module.reward_models[name]
        supported = {source: sum(map(reward.supports, prompts)) / len(prompts) for source, prompts in data.pools.items()}
        share = sum(number * supported[source] for source, number in data.shares.items()) / sum(data.shares.values())
        total += found.flops * share * plan.images / min(module.sampling.batch_size, reward.batch_size)
    return total


def parts_of(count: Phases, gpus: int, shards: int) -> dict[str, int]:
    """Bytes of what stays on the device, for a while at least, by name."""
    policy, module = count.policy, count.module
    adapters = [parameter for name in ADAPTERS for parameter in policy.parameters_of(name)]
    vae, encoders = policy.pipeline.vae, list(policy.text_encoders.values())
    apart = {id(tensor) for tensor in (*adapters, *tensors_of(vae, *encoders))}
    here = tensors_of(*(module.reward_models[name] for name in on_this_gpu(module)))
    conditions = count.encoding[0]
    elsewhere, gathered = sharded_bytes(policy, shards)
    return {
        "transformer": bytes_of([tensor for tensor in tensors_of(policy) if id(tensor) not in apart]) - elsewhere,
        "gathered blocks": gathered,
        "adapters": bytes_of(adapters),
        "gradients": bytes_of(count.trained) * (1 if gpus == 1 else 2),  # and DistributedDataParallel's buckets
        "optimizer": count.optimizer[0],
        "autoencoder": bytes_of(tensors_of(vae)),
        "text encoders": bytes_of(tensors_of(*encoders)),
        "rewards": bytes_of(here),
        "latents and prompts": bytes_of([count.latents(count.images), *conditions.tensors.values()]),
        "images": bytes_of([count.pixels(count.images)]),
    }


def sharded_bytes(policy: FlowPolicy, shards: int) -> tuple[int, int]:
    """Bytes of the transformer's frozen weights that other processes keep, and those that are gathered at most."""
    if shards == 1:
        return 0, 0
    whole, *blocks = (
        bytes_of(parameter for name, parameter in module.named_parameters() if not is_adapter(name))
        for module in (policy.transformer, *blocks_of(policy))
    )
    outside = whole - sum(blocks)  # gathered for the whole forward or backward pass
    return whole - whole // shards, outside + GATHERED * max(blocks)


def on_this_gpu(module: DiffusionNFT) -> list[str]:
    """Rewards and metrics whose device is the run's, by name."""
    run = module.trainer.strategy.root_device
    index = (run.index or 0) if run.type == "cuda" else 0
    places = {name: torch.device(place) for name, place in module.scorer.settings.devices.items()}
    return [
        name
        for name in module.reward_models
        if name not in places or (places[name].type == "cuda" and places[name].index in (None, index))
    ]
