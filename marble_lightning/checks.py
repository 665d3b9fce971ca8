"""Checks of settings, data and rewards before any weights are loaded, and of the loaded weights of several processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import ceil, gcd

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from balancers import Balancer
from marble_lightning.data.datamodule import PromptDataModule, get_datamodule
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.rollout import Plan
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.embedding_cache import fingerprint
from marble_lightning.policies.sharding import ShardedBaseStrategy
from marble_lightning.scoring.failures import exit_is_failure
from marble_lightning.utils.distributed import OnAllRanks, gather_items
from rewards import Prompt, Reward
from rewards.texts import excerpt, reason

log = logging.getLogger(__name__)

WHOLE_ROUNDS: dict[str, tuple[object, ...]] = {
    "limit_train_batches": (1.0,),  # the integer 1 would be one micro-batch
    "overfit_batches": (0.0, 0),
    "fast_dev_run": (False, 0),
    "max_steps": (-1,),
}
"""Trainer options that could shorten a round, with the values that do not. Types are compared too: 1 == 1.0 == True."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Precisions of the trainer that keep the adapters and their gradients in float32."""


def get_balancer(trainer: Trainer) -> Balancer:
    """The trainer's only Balancer callback.

    Raises:
        ValueError: The trainer has none, or more than one.
    """
    balancers = [callback for callback in trainer.callbacks if isinstance(callback, Balancer)]  # type: ignore[attr-defined]
    if len(balancers) != 1:
        raise ValueError(f"The trainer must have one Balancer callback, e.g. balancers.MARBLE(). Found {len(balancers)}.")
    return balancers[0]


def check_adapter_is_used(policy: FlowPolicy, checkpoint: object) -> None:
    """Refuse a checkpoint where the policy uses no adapter."""
    if policy.adapter is None:
        raise ValueError(
            "`ckpt_path` must be null where `policy.adapter` is none: a checkpoint holds adapters, and none is used. "
            f"Found {checkpoint}; choose the adapter ema or trained to evaluate it."
        )


def check_training(policy: FlowPolicy, rewards: Mapping[str, Reward], data: PromptDataModule) -> None:
    """Check that there is an adapter to train, and that the rewards can score the training prompts."""
    if policy.adapter is None:
        raise ValueError("`policy.adapter` must be ema or trained for `fit`, which trains one. Found none.")
    check_rewards_apply(rewards, data)
    check_prompts(rewards, data.training)


def check_precision(trainer: Trainer) -> None:
    """Refuse a precision that does not keep the adapters in float32."""
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"`precision` must be one of {', '.join(PRECISIONS)}. Found {trainer.precision}: adapters learn in float32; "
            "`policy.dtype` is the precision of the frozen weights."
        )


class DifferentWeights(OnAllRanks, ValueError):
    """Processes of one run have loaded different weights."""


def check_same_weights(trainer: Trainer, policy: FlowPolicy, rewards: Mapping[str, Reward]) -> None:
    """Check that all processes have loaded the same weights; nothing sends frozen weights from one to another.

    Compares `fingerprint`s, which take the ends of every tensor. All processes must call it.

    Raises:
        DifferentWeights: They differ; on all processes.
    """
    if trainer.world_size == 1:
        return
    named = {f"rewards.{name}": reward for name, reward in rewards.items()}
    parts = {"policy": policy, **getattr(policy, "text_encoders", {}), **named}
    if getattr(policy, "sharded", False):
        del parts["policy"]  # it was compared as a whole
    by_rank = gather_items([{name: fingerprint({name: part}) for name, part in parts.items()}])
    if different := [name for name in parts if len({prints[name] for prints in by_rank}) > 1]:
        raise DifferentWeights(
            f"All processes of a run must load the same weights. Found different ones of {', '.join(different)}; give every "
            "machine the same files, and create random weights from a fixed seed."
        )


def check_prompts_per_process(data: PromptDataModule, ranks: int) -> None:
    """Check that every process gets the same number of prompts."""
    if data.prompts_per_round % ranks:
        raise ValueError(
            f"`prompts_per_round` must be a multiple of the number of processes, {ranks}. Found {data.prompts_per_round}."
        )


def plan_round(
    trainer: Trainer, sampling: Sampling, objective: Objective, batch_size: int, optimizer_steps: int, inner_epochs: int
) -> Plan:
    """Plan the micro-batches and optimizer steps of a round.

    Raises:
        ValueError: Settings of the trainer or of the data do not allow whole rounds.
    """
    data, ranks = get_datamodule(trainer), trainer.world_size
    check_prompts_per_process(data, ranks)
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "`accumulate_grad_batches` follows from the size of a round and must stay 1. "
            f"Found {trainer.accumulate_grad_batches}; set `micro_batch_size` and `optimizer_steps_per_round`."
        )
    for name, defaults in WHOLE_ROUNDS.items():
        value = getattr(trainer, name)
        if not any(type(value) is type(default) and value == default for default in defaults):
            raise ValueError(
                f"`{name}` must keep its default, {defaults[0]}, since a round is trained on as a whole. Found {value}; "
                "use `max_epochs` for fewer rounds, and `prompts_per_round` or `images_per_prompt` for smaller ones."
            )
    if any(isinstance(callback, Timer) and callback._interval == Interval.step for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "`max_time` must be null, since a round is trained on as a whole. Found one; use `max_epochs`, or the callback "
            "Timer with `interval: epoch`, which ends a run after a round."
        )
    images = data.prompts_per_round // ranks * data.images_per_prompt
    plan = Plan(images, sampling.times, batch_size, optimizer_steps, inner_epochs)
    check_kl_every(objective, plan)
    return plan


def check_kl_every(objective: Objective, plan: Plan) -> None:
    """Check that every optimizer step has as many KL terms."""
    if plan.per_step % objective.kl_every:
        raise ValueError(
            f"`objective.kl_every` must divide the micro-batches of an optimizer step, {plan.per_step}. "
            f"Found {objective.kl_every}; try {gcd(plan.per_step, objective.kl_every)}."
        )


def check_rewards_apply(rewards: Mapping[str, Reward], data: PromptDataModule) -> None:
    """Check that each reward applies to at least one training prompt."""
    for name, reward in rewards.items():
        with exit_is_failure(name):
            applies = any(map(reward.supports, data.training))
        if not applies:
            raise ValueError(
                f"`rewards.{name}` must apply to at least one training prompt. Found none in {', '.join(data.shares)}; "
                "add a source of prompts that it applies to, or leave it out."
            )


def check_prompts(reward_models: Mapping[str, Reward], prompts: Iterable[Prompt]) -> None:
    """Check that no reward or metric rejects a prompt that it applies to."""
    for prompt in prompts:
        for name, reward_model in reward_models.items():
            try:
                with exit_is_failure(name):
                    if reward_model.supports(prompt):
                        reward_model.check_prompt(prompt)
            except ValueError as error:
                raise ValueError(
                    f"`{name}` must be able to score every prompt that it applies to. Found {excerpt(prompt.text)} of "
                    f"source {excerpt(prompt.source)}, which it rejects: {reason(error)}"
                ) from error


def prompts_without_a_score(reward_models: Mapping[str, Reward], prompts: Iterable[Prompt]) -> list[str]:
    """Warnings about rewards and metrics that do not apply to all prompts of their sources, one sentence each.

    The sources of a reward are those in its `sources`, and those with at least one prompt that it applies to. An OCR reward,
    for example, applies to prompts with a text in quotes.
    """
    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    sentences = []
    for name, reward_model in reward_models.items():
        for source, of_source in by_source.items():
            missing = [prompt for prompt in of_source if not reward_model.supports(prompt)]
            named = reward_model.sources is not None and source in reward_model.sources
            if missing and (named or len(missing) < len(of_source)):
                sentences.append(
                    f"`{name}` does not apply to {len(missing)} of {len(of_source)} prompts of the source "
                    f"{excerpt(source)}, which get no score from it. For example {excerpt(missing[0].text)}."
                )
    return sentences


def check_held_out_prompts(trainer: Trainer) -> None:
    """Check that every process has at least one held-out image to sample, and with a sharded base as many batches."""
    if (images := len(get_datamodule(trainer).held_out)) < trainer.world_size:
        raise ValueError(
            f"There must be an image for each of the {trainer.world_size} processes to sample. Found {images}; use fewer "
            "devices, or more prompts or images per prompt."
        )
    if isinstance(trainer.strategy, ShardedBaseStrategy):
        check_held_out_batches(get_datamodule(trainer), trainer.world_size)


def check_strategy(trainer: Trainer, policy: FlowPolicy) -> None:
    """Refuse strategies that shard adapters or step by themselves, and settings that a sharded base does not support.

    A balancer writes the merged gradient into the adapters' own `grad`, once in an optimizer step.
    """
    known = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not known or trainer.strategy.handles_gradient_accumulation:  # the latter: DeepSpeed's, a subclass of DDP's
        raise ValueError(
            "`trainer.strategy` must keep whole adapters on every device: auto, ddp, or, where the base does not fit, "
            f"marble_lightning.ShardedBaseStrategy. Found {type(trainer.strategy).__name__}."
        )
    if not isinstance(trainer.strategy, ShardedBaseStrategy):
        return
    if trainer.num_devices == 1:
        raise ValueError(
            "`trainer.devices` must be >= 2 with ShardedBaseStrategy, which shards over the devices of a machine. Found 1; "
            "use another `trainer.strategy`."
        )
    if getattr(policy, "compiled", False):
        raise ValueError(
            "`policy.compile` must be false with ShardedBaseStrategy, which gathers the weights of each block. Found true."
        )
    if quantised := getattr(policy, "quantised", None):
        raise ValueError(
            f"`policy.quantised` must be null with ShardedBaseStrategy, which splits every weight. Found {quantised}; "
            "use one of the two."
        )


def check_held_out_batches(data: PromptDataModule, ranks: int) -> None:
    """Check that every process samples equally many batches of held-out images, for which they gather weights together."""
    images, size = len(data.held_out), data.held_out_batch_size
    fewest, most = images // ranks, ceil(images / ranks)
    if ceil(fewest / size) != ceil(most / size):
        larger = next(number for number in range(size + 1, size + most + 1) if fewest % number)
        raise ValueError(
            "With ShardedBaseStrategy every process must have as many batches of held-out images. Found "
            f"{ceil(fewest / size)} on some and {ceil(most / size)} on others, for {images} images on {ranks} processes; "
            f"use e.g. `data.held_out_batch_size` {larger}."
        )


def warn_about_prompts(policy: FlowPolicy, reward_models: Mapping[str, Reward], data: PromptDataModule) -> None:
    """Warn about prompts that the text encoders truncate, and about prompts without a score."""
    prompts = list({id(prompt): prompt for prompt in data.training + data.held_out}.values())  # without repetitions
    texts = [prompt.text for prompt in prompts]
    if truncated := policy.truncated_prompts(dict.fromkeys(texts)):
        log.warning(
            f"The CLIP text encoders do not read the end of {len(truncated)} of {len(set(texts))} prompts, which have more "
            f"than {policy.max_prompt_tokens} tokens. For example {excerpt(truncated[0])}."
        )
    for sentence in prompts_without_a_score(reward_models, prompts):
        log.warning(sentence)
