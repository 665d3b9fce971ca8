"""The evaluator: samples held-out prompts, each with its fixed noise, and scores the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torchmetrics import CatMetric

from marble_lightning.checkpoints.files import warn
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.evaluation.statistics import by_tag, per_prompt
from marble_lightning.nft.divergence import Finite
from marble_lightning.policies.base import Conditions, FlowPolicy, concat_conditions
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.utils.seeds import derived_seed, generator
from rewards import Prompt, Reward

ENCODE_AHEAD = 64
"""Number of held-out prompts that are encoded at once; moving SD3.5's text encoders to the device copies gigabytes."""

BATCHES: dict[Any, str] = {
    RunningStage.SANITY_CHECKING: "num_sanity_val_batches",
    RunningStage.VALIDATING: "num_val_batches",
    RunningStage.TESTING: "num_test_batches",
    RunningStage.PREDICTING: "num_predict_batches",
}
"""The trainer's attribute with the number of batches of a stage, by stage."""

HeldOut = list[tuple[int, Prompt]]
"""A batch of held-out prompts, each with the index that seeds its noise."""


class Evaluator:
    """Samples held-out prompts with the policy's adapter, scores the images, and keeps the scores.

    Args:
        policy: The model that is evaluated, with its `adapter`.
        scorer: Scores images by all rewards and metrics.
        evaluation: How held-out prompts are sampled.
        seed: Seed of the noise if `evaluation` has none.
        finite: Records latents and images that are not finite.
    """

    def __init__(self, policy: FlowPolicy, scorer: Scorer, evaluation: Evaluation, seed: int, finite: Finite) -> None:
        self.policy, self.scorer, self.evaluation, self.seed, self.finite = policy, scorer, evaluation, seed, finite
        self.scores = CatMetric(nan_strategy="disable")
        self.base_scores: Tensor | None = None
        """Held-out scores (prompt, reward) of the base, from the trainer's sanity check; kept in checkpoints."""
        self.trained_scores: Tensor | None = None
        """Held-out scores (prompt, reward) of the policy's adapter, from the last validation; kept in checkpoints."""
        self.evaluated_step = 0
        """Optimizer step of `trained_scores` in `fit`."""
        self.scores_predictions = True
        """Whether `predict` scores its images; set it before `select_reward_models`."""
        self.selected: dict[str, Reward] = {}
        """The reward models that score in the current stage."""
        self.encoded: dict[str, Conditions] = {}
        """Encoded held-out prompts of this batch and of later ones, on the CPU."""
        self.ahead: tuple[HeldOut, Tensor] | None = None
        """The next batch and its images, where they were sampled while the previous batch was scored."""

    @property
    def reward_models(self) -> Mapping[str, Reward]:
        """Rewards and metrics, which score held-out images."""
        return self.scorer.rewards

    def select_reward_models(self, stage: str, prompts: Sequence[Prompt]) -> None:
        """Select the reward models that score.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            prompts: The held-out prompts. For `predict` only reward models that apply to any of them score; none do if
                `scores_predictions` is false.
        """
        self.selected = dict(self.reward_models)
        if stage == "predict":
            candidates = self.reward_models if self.scores_predictions else {}
            self.selected = {
                name: reward_model for name, reward_model in candidates.items() if any(map(reward_model.supports, prompts))
            }

    def check_resolution(self, stage: str) -> None:
        """Refuse a resolution that the policy cannot sample at. Loads no weights."""
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
        """The `evaluation` settings, with the policy's resolution and the run's seed in place of null."""
        options = asdict(self.evaluation)
        defaults = {"resolution": self.policy.resolution, "seed": self.seed}
        return options | {name: value for name, value in defaults.items() if options[name] is None}

    def adapter(self, trainer: Trainer) -> str:
        """Name of the evaluated adapter; `none` if nothing was trained, since a new adapter does not change the base."""
        trained = trainer.state.fn == "fit" or trainer.ckpt_path or self.policy.init_lora
        return self.policy.adapter if self.policy.adapter and trained else "none"

    def held_out_state(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint keeps: scores of the base and of the adapter, and what they depend on."""
        scores = {"adapter": self.policy.adapter, "optimizer_step": self.evaluated_step, "scores": self.trained_scores}
        return {
            "base_scores": self.base_scores,
            "base_measured": self.baseline_key(trainer),
            "trained_scores": None if self.trained_scores is None else scores,
        }

    def baseline_key(self, trainer: Trainer) -> str:
        """All that the base's held-out scores depend on; a checkpoint's scores are reused only if its key is equal."""
        model = self.policy.identity | {"init_lora": self.policy.init_lora}
        reward_models = {name: reward_model.identity for name, reward_model in self.reward_models.items()}
        prompts = derived_seed(*map(repr, get_datamodule(trainer).held_out))
        return repr((model, trainer.precision, self.settings, reward_models, prompts))

    def load_held_out_state(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Reuse a checkpoint's scores, if they depend on the same settings; the base is not evaluated then.

        The adapter's scores are needed where a run was killed after its last round and before it wrote its results.
        """
        same_settings = checkpoint["base_measured"] == self.baseline_key(trainer)
        trained = checkpoint["trained_scores"]
        if trainer.state.fn == "fit" and same_settings and trained and trained["adapter"] == self.policy.adapter:
            self.trained_scores, self.evaluated_step = trained["scores"], trained["optimizer_step"]
        if same_settings and checkpoint["base_scores"] is not None:
            self.base_scores = checkpoint["base_scores"]
            trainer.num_sanity_val_steps = 0
        elif self.policy.init_lora is not None and trainer.state.fn == "fit":
            trainer.num_sanity_val_steps = 0
            warn("The base is not evaluated: this run began at `policy.init_lora`, which the checkpoint's adapters replace.")

    def predict(self, trainer: Trainer, batch: HeldOut, index: int) -> dict[str, Tensor]:
        """Sample prompts with the policy's adapter, each with its own noise, and score the images.

        The next batch is sampled meanwhile, if `scoring.overlap` is set and its prompts are encoded.

        Args:
            trainer: The trainer, with the data module.
            batch: The prompts.
            index: Index of the batch on this rank.

        Returns:
            `images` (image, 3, pixel, pixel) and `scores` (image, selected reward model).
        """
        ahead, self.ahead = self.ahead, None
        images = ahead[1] if ahead is not None and ahead[0] == batch else self.sample(trainer, batch)
        if not self.selected:
            return {"images": images, "scores": images.new_empty(len(images), 0)}
        self.scorer.submit(images, [prompt for _, prompt in batch], self.selected)
        if following := self._to_sample_ahead(trainer, batch, index):
            self.ahead = following, self.sample(trainer, following)
        return {"images": images, "scores": self.scorer.collect()}

    def _to_sample_ahead(self, trainer: Trainer, batch: HeldOut, index: int) -> HeldOut:
        """The next batch, if it can be sampled while this one is scored; otherwise an empty one.

        Text encoders and rewards may have no room beside each other, so prompts that are not encoded wait for the scores.
        Ranks may decide differently, so those with a sharded base never sample ahead: they sample together.
        """
        batches = getattr(trainer, BATCHES[trainer.state.stage])[0]
        overlap = self.scorer.settings.overlap and not self.policy.sharded
        if not overlap or self.scorer.stopping() or index + 1 == batches:
            return []
        data = get_datamodule(trainer)
        of_rank = list(enumerate(data.held_out))[batch[-1][0] :: trainer.world_size]  # in the order of its loader
        following = of_rank[1 : 1 + data.held_out_batch_size]
        return following if all(prompt.text in self.encoded for _, prompt in following) else []

    def evaluate(self, trainer: Trainer, batch: HeldOut, index: int) -> dict[str, Tensor]:
        """As `predict`, and keep the scores."""
        outputs = self.predict(trainer, batch, index)
        scores = outputs["scores"]
        indices = torch.tensor([number for number, _ in batch], device=scores.device, dtype=torch.float32)
        self.scores.update(torch.cat([indices[:, None], scores], dim=1))
        return outputs

    def sample(self, trainer: Trainer, batch: HeldOut) -> Tensor:
        """Sample images of prompts; the index of a prompt seeds its noise."""
        conditions, empty = self._encode(trainer, batch)
        options = self.settings
        seed = options.pop("seed")
        noise = [generator(seed, "held-out", index) for index, _ in batch]
        base = trainer.sanity_checking and self.policy.init_lora is None  # also if a run is resumed
        adapter = None if base else self.policy.adapter
        latents = self.policy.sample(conditions, noise, adapter, unconditional=empty, **options)
        with self._without_autocast():
            images = self.policy.decode(latents)
        self.finite.note(latents, images)
        return images

    def _without_autocast(self) -> AbstractContextManager[object]:
        """As in training: text encoders and autoencoder have a precision of their own, and T5 overflows in float16."""
        return torch.autocast(self.policy.device.type, enabled=False)

    def _encode(self, trainer: Trainer, batch: HeldOut) -> tuple[Conditions, Conditions | None]:
        """The encoded prompts of a batch, and the encoded empty prompt if guidance needs it.

        Text encoders move to the device once for `ENCODE_AHEAD` of this rank's prompts; rewards free their memory first.
        """
        texts, empty = [prompt.text for _, prompt in batch], [""] if self.evaluation.guidance > 1 else []
        if any(text not in self.encoded for text in texts + empty):
            self.scorer.release()
            of_rank = get_datamodule(trainer).held_out[batch[0][0] :: trainer.world_size]  # in the order of its loader
            to_encode = list(dict.fromkeys(empty + texts + [prompt.text for prompt in of_rank]))
            to_encode = to_encode[: max(ENCODE_AHEAD, len(empty + texts))]
            with self._without_autocast():
                self.encoded = dict(zip(to_encode, self.policy.encode(to_encode).split(), strict=True))
        conditions = concat_conditions([self.encoded[text] for text in texts], self.policy.device)
        return conditions, concat_conditions([self.encoded[text] for text in empty], self.policy.device) if empty else None

    def finish(self, trainer: Trainer) -> dict[str, float]:
        """End a pass over the held-out prompts on all ranks: keep the scores and return their means by metric.

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
            self.trained_scores, self.evaluated_step = scores, trainer.global_step
        columns = {**dict(zip(self.reward_models, scores.T, strict=True)), **by_tag(self.reward_models, prompts, scores)}
        # floats instead of CPU tensors: the log reduces a tensor on its own device, and NCCL has no CPU backend
        means = {f"held_out/{name}": float(column.nanmean()) for name, column in columns.items() if not column.isnan().all()}
        return means | {f"skipped/held_out/{name}": float(count) for name, count in skipped.items() if count}

    def check_images(self, trainer: Trainer) -> None:
        """Refuse images that are not finite, on all ranks."""
        trained = not trainer.sanity_checking and self.adapter(trainer) != "none"
        self.finite.check_images(trainer.strategy, trained)
