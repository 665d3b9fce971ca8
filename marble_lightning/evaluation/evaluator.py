"""Held-out prompts, sampled with noise of their own and scored: how the base and the trained policy are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import CatMetric

from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.evaluation.statistics import by_tag, per_prompt
from marble_lightning.nft.divergence import Finite
from marble_lightning.policies.base import Conditions, FlowPolicy, joined
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.utils.seeds import derived_seed, generator
from rewards import Prompt, Reward

ENCODE_AHEAD = 64
"""Held-out prompts that are encoded in one visit of the text encoders, which for SD3.5 are gigabytes to move."""

HeldOut = list[tuple[int, Prompt]]
"""A batch of held-out prompts, each with the index that names its noise."""


class Evaluator:
    """Samples held-out prompts with the policy's adapter, scores the images, and remembers the scores.

    Args:
        policy: The model that is evaluated, with the adapter it says.
        scorer: Scores images by all rewards and metrics.
        evaluation: How held-out prompts are sampled.
        seed: Seed of their noise, where `evaluation` has none.
        finite: Takes note of latents and images that are not finite.
    """

    def __init__(self, policy: FlowPolicy, scorer: Scorer, evaluation: Evaluation, seed: int, finite: Finite) -> None:
        self.policy, self.scorer, self.evaluation, self.seed, self.finite = policy, scorer, evaluation, seed, finite
        self.scores = CatMetric(nan_strategy="disable")
        self.base_scores: Tensor | None = None
        """Held-out scores (prompt, judge) of the base, measured by the trainer's sanity check; kept in checkpoints."""
        self.trained_scores: Tensor | None = None
        """The same of the policy's adapter, from the last validation."""
        self.scores_predictions = True
        """Whether `predict` scores its images; to be set before `ask`."""
        self.asked: dict[str, Reward] = {}
        """The judges that score, once it is known what for."""
        self.ahead: dict[str, Conditions] = {}
        """Encoded held-out prompts, of this batch and of those that follow, on the CPU."""

    @property
    def reward_models(self) -> Mapping[str, Reward]:
        """Rewards and metrics: what held-out images are scored by."""
        return self.scorer.rewards

    def ask(self, stage: str, prompts: Sequence[Prompt]) -> None:
        """Find out which judges score.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            prompts: The held-out prompts. For `predict` only judges that apply to any of them score, or none at all.
        """
        self.asked = dict(self.reward_models)
        if stage == "predict":
            wanted = self.reward_models if self.scores_predictions else {}
            self.asked = {name: each for name, each in wanted.items() if any(map(each.supports, prompts))}

    def check_resolution(self, stage: str) -> None:
        """Refuse a resolution that the policy cannot sample at; loads nothing."""
        if self.evaluation.resolution is not None:
            self.policy.check_resolution("model.evaluation.resolution", self.evaluation.resolution)
        if self.evaluation.resolution is None or stage == "fit":
            self.policy.check_resolution("model.policy.resolution", self.policy.resolution)

    def metric_names(self, prompts: Sequence[Prompt]) -> set[str]:
        """Names of the metrics that every validation logs."""
        scored = {
            name: reward_model
            for name, reward_model in self.reward_models.items()
            if any(map(reward_model.supports, prompts))
        }
        tags = by_tag(scored, prompts, torch.zeros(len(prompts), len(scored)))
        return {f"held_out/{name}" for name in (*scored, *tags)}

    @property
    def settings(self) -> dict[str, Any]:
        """How held-out prompts are sampled, with the values that `evaluation` leaves to policy and run."""
        own = asdict(self.evaluation)
        defaults = {"resolution": self.policy.resolution, "seed": self.seed}
        return own | {name: value for name, value in defaults.items() if own[name] is None}

    def adapter(self, trainer: Trainer) -> str:
        """The adapter that is evaluated, `none` where nothing was trained: a new adapter changes nothing."""
        trained = trainer.state.fn == "fit" or trainer.ckpt_path or self.policy.init_lora
        return self.policy.adapter if self.policy.adapter and trained else "none"

    def baseline_key(self, trainer: Trainer) -> str:
        """What the base's held-out scores depend on; a checkpoint's are taken over only where it is the same."""
        model = self.policy.identity | {"init_lora": self.policy.init_lora}
        reward_models = {name: reward_model.identity for name, reward_model in self.reward_models.items()}
        prompts = derived_seed(*map(repr, get_datamodule(trainer).held_out))
        return repr((model, trainer.precision, self.settings, reward_models, prompts))

    def predict(self, trainer: Trainer, batch: HeldOut) -> dict[str, Tensor]:
        """Sample prompts with the policy's adapter, each with noise of its own; score the images, (image, judge asked)."""
        images = self.sample(trainer, batch)
        self.scorer.submit(images, [prompt for _, prompt in batch], self.asked)
        return {"images": images, "scores": self.scorer.collect() if self.asked else images.new_empty(len(images), 0)}

    def evaluate(self, trainer: Trainer, batch: HeldOut) -> dict[str, Tensor]:
        """As `predict`, and remember the scores."""
        found = self.predict(trainer, batch)
        indices = torch.tensor([index for index, _ in batch], device=found["scores"].device, dtype=torch.float32)
        self.scores.update(torch.cat([indices[:, None], found["scores"]], dim=1))
        return found

    def sample(self, trainer: Trainer, batch: HeldOut) -> Tensor:
        """Images of prompts; the index names the noise."""
        conditions, empty = self._encoded(trainer, batch)
        options = self.settings
        seed = options.pop("seed")
        noise = [generator(seed, "held-out", index) for index, _ in batch]
        base = trainer.sanity_checking and self.policy.init_lora is None  # also where a run is resumed
        adapter = None if base else self.policy.adapter
        latents = self.policy.sample(conditions, noise, adapter, unconditional=empty, **options)
        images = self.policy.decode(latents)
        self.finite.note(latents, images)
        return images

    def _encoded(self, trainer: Trainer, batch: HeldOut) -> tuple[Conditions, Conditions | None]:
        """The encoded prompts of a batch, and the empty one where guidance needs it.

        Text encoders visit the device once for `ENCODE_AHEAD` of this rank's prompts, while rewards leave it to them.
        """
        texts, empty = [prompt.text for _, prompt in batch], [""] if self.evaluation.guidance > 1 else []
        if any(text not in self.ahead for text in texts + empty):
            self.scorer.release()
            own = get_datamodule(trainer).held_out[batch[0][0] :: trainer.world_size]  # as its loader deals
            wanted = list(dict.fromkeys(empty + texts + [prompt.text for prompt in own]))
            wanted = wanted[: max(ENCODE_AHEAD, len(empty + texts))]
            encoded = self.policy.encode(wanted)
            parts = zip(encoded.embeds.cpu().split(1), encoded.pooled.cpu().split(1), strict=True)
            self.ahead = dict(zip(wanted, map(Conditions, *zip(*parts, strict=True)), strict=True))
        found = joined([self.ahead[text] for text in texts], self.policy.device)
        return found, joined([self.ahead[text] for text in empty], self.policy.device) if empty else None

    def finish(self, trainer: Trainer) -> dict[str, float]:
        """End a pass over the held-out prompts on all ranks: keep its scores, return their means by metric.

        Raises:
            Diverged: Images are not finite; on all ranks.
            RewardError: A reward failed; on all ranks.
        """
        data = get_datamodule(trainer)
        prompts = data.held_out[:: data.held_out_images]
        scores = per_prompt(self.scores.compute().cpu(), len(prompts), data.held_out_images)
        self.scores.reset()
        self.check_images(trainer)
        skipped = self.scorer.check(trainer.strategy)
        self.scorer.release()
        if trainer.sanity_checking:
            self.base_scores = scores
        else:
            self.trained_scores = scores
        columns = {**dict(zip(self.reward_models, scores.T, strict=True)), **by_tag(self.reward_models, prompts, scores)}
        # numbers, not these tensors of the CPU: the log averages over ranks where a tensor lies, and NCCL knows GPUs only
        means = {f"held_out/{name}": float(column.nanmean()) for name, column in columns.items() if not column.isnan().all()}
        return means | {f"skipped/held_out/{name}": float(count) for name, count in skipped.items() if count}

    def check_images(self, trainer: Trainer) -> None:
        """Refuse images that are not finite, on all ranks."""
        trained = not trainer.sanity_checking and self.adapter(trainer) != "none"
        self.finite.check_pictures(trainer.strategy, trained)
