"""How a policy is judged: held-out prompts sampled with noise of their own and scored, for the base and the trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import CatMetric

from marble_lightning.checks import every_prompt_can_be_judged, the_data
from marble_lightning.policy import Adapter, SD3Policy, is_adapter
from marble_lightning.round_start import RoundStart
from marble_lightning.scoring import Scorer
from marble_lightning.seeds import derived_seed, generator
from marble_lightning.settings import Evaluation, Scoring
from marble_lightning.table import MEAN_OF_TAGS, per_prompt
from rewards import Prompt, Reward

log = logging.getLogger(__name__)

HeldOut = list[tuple[int, Prompt]]
"""A batch of held-out prompts, each with the index that names its noise."""


class HeldOutEvaluation(LightningModule):
    """A policy and its judges: what `validate` and `predict` need, and `fit` before and after.

    Args:
        policy: The model that is judged, with its averaged adapter.
        rewards: Rewards it learns, by the name they are logged under.
        metrics: Rewards that are only measured.
        scoring: What happens where one of them fails.
        evaluation: How held-out prompts are sampled.
        seed: Seed of their noise.
    """

    strict_loading = False  # checkpoints hold the adapters only; `on_load_checkpoint` checks that they are all there

    def __init__(
        self,
        policy: SD3Policy,
        rewards: dict[str, Reward],
        metrics: dict[str, Reward],
        scoring: Scoring,
        evaluation: Evaluation,
        seed: int,
    ) -> None:
        super().__init__()
        self.policy, self.evaluation, self.seed = policy, evaluation, seed
        self.rewards, self.metrics = nn.ModuleDict(rewards), nn.ModuleDict(metrics)
        self.scorer = Scorer(self.judges, scoring)
        self.held_out_scores = CatMetric(nan_strategy="disable")
        self.base_scores: Tensor | None = None
        """Held-out scores (prompt, judge) of the base, measured by the trainer's sanity check; kept in checkpoints."""
        self.trained_scores: Tensor | None = None
        """The same of the averaged adapter, from the last validation."""
        self.round_start = RoundStart()

    def setup(self, stage: str) -> None:
        """Check the held-out prompts, then load the weights of policy and judges."""
        data = the_data(self.trainer)
        every_prompt_can_be_judged(self.judges, data.held_out)
        self.policy.setup(self.seed)
        for judge in self.judges.values():
            judge.setup()
            judge.requires_grad_(False)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asked on every rank: it is a broadcast
        self.scorer.setup(folder, f"_{self.trainer.global_rank}" if self.trainer.world_size > 1 else "")
        # Nothing here has buffers that change. Rewards may be elsewhere, where ranks cannot send each other theirs.
        constant = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constant)
        if self.trainer.is_global_zero:
            self._tell_of_cut_prompts([prompt.text for prompt in data.training + data.held_out])

    def _tell_of_cut_prompts(self, texts: list[str]) -> None:
        if cut := self.policy.too_long(dict.fromkeys(texts)):
            log.warning(
                f"The CLIP text encoders do not read the end of {len(cut)} of {len(set(texts))} prompts, which have more "
                f"than {self.policy.most_tokens} tokens. For example {cut[0]!r}."
            )

    @property
    def judges(self) -> dict[str, Reward]:
        """Rewards and metrics: what held-out pictures are scored by."""
        return cast(dict[str, Reward], {**dict(self.rewards.items()), **dict(self.metrics.items())})

    @property
    def measured(self) -> str:
        """What held-out scores depend on besides the policy; scores are compared only where it is the same."""
        texts = [prompt.text for prompt in the_data(self.trainer).held_out]
        return repr((self.seed, self.evaluation, list(self.judges), derived_seed(*texts)))

    def predict_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        """Sample prompts with the averaged adapter, each with noise of its own, and score the pictures."""
        images = self.sample_held_out(batch)
        return {"images": images, "scores": self.scorer(images, [prompt for _, prompt in batch])}

    def validation_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        """As `predict_step`, and remember the scores."""
        pictures = self.predict_step(batch, batch_idx)
        indices = torch.tensor([index for index, _ in batch], device=self.device, dtype=torch.float32)
        self.held_out_scores.update(torch.cat([indices[:, None], pictures["scores"]], dim=1))
        return pictures

    test_step = validation_step

    def sample_held_out(self, batch: HeldOut) -> Tensor:
        """Pictures of prompts; the index names the noise."""
        adapter: Adapter | None = None if self.trainer.sanity_checking else "ema"  # a resumed run may measure the base too
        conditions = self.policy.encode([prompt.text for _, prompt in batch])
        empty = self.policy.encode([""]) if self.evaluation.guidance > 1 else None
        noise = [generator(self.seed, "held-out", index) for index, _ in batch]
        latents = self.policy.sample(
            conditions, noise, adapter, steps=self.evaluation.steps, solver=self.evaluation.solver,
            guidance=self.evaluation.guidance, unconditional=empty,
        )  # fmt: skip
        return self.policy.decode(latents)

    def on_validation_epoch_end(self) -> None:
        scores = per_prompt(self.held_out_scores.compute().cpu(), the_data(self.trainer).held_out_images)
        self.held_out_scores.reset()
        skipped = self.scorer.check(self.trainer.strategy)
        self.scorer.release()
        if self.trainer.sanity_checking:
            self.base_scores = scores
        else:
            self.trained_scores = scores
        columns = {**dict(zip(self.judges, scores.T, strict=True)), **self.by_tag(scores)}
        means = {f"held_out/{name}": column.nanmean() for name, column in columns.items()}
        means |= {f"skipped/held_out/{name}": torch.tensor(count) for name, count in skipped.items() if count}
        if not self.trainer.sanity_checking:
            self.log_dict(means)
        elif self.logger is not None:
            self.logger.log_metrics({name: float(mean) for name, mean in means.items()}, step=0)
        self.round_start.judged(self.trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self) -> None:
        self.scorer.check(self.trainer.strategy)

    def by_tag(self, scores: Tensor) -> dict[str, Tensor]:
        """Scores (prompt,) of each judge and tag, as `geneval/counting`, NaN for other prompts; then the mean over its tags.

        Args:
            scores: Held-out scores (prompt, judge). Nothing is told apart where they are not those of all prompts.
        """
        data, found = the_data(self.trainer), dict[str, Tensor]()
        prompts = data.held_out[:: data.held_out_images]
        for (name, judge), column in zip(self.judges.items(), scores.T, strict=True):
            tags = [judge.tag(prompt) if judge.applies_to(prompt) else None for prompt in prompts]
            if len(tags) == len(column) and any(tags):
                own = {
                    f"{name}/{tag}": torch.where(torch.tensor([each == tag for each in tags]), column, torch.nan)
                    for tag in dict.fromkeys(filter(None, tags))
                }
                found |= own
                found[f"{name}/{MEAN_OF_TAGS}"] = torch.stack([each.nanmean() for each in own.values()]).mean()[None]
        return found

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, never the frozen weights; in the middle of a round, those of its beginning."""
        adapters = {name: tensor for name, tensor in checkpoint["state_dict"].items() if is_adapter(name)}
        checkpoint["state_dict"], checkpoint["lora"] = adapters, self.policy.lora
        checkpoint["base_scores"], checkpoint["base_measured"] = self.base_scores, self.measured
        self.round_start.put_into(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that the checkpoint's adapters are this policy's, and that its base was measured as ours would be."""
        if checkpoint["lora"] != self.policy.lora:
            raise ValueError(
                f"The checkpoint must hold adapters like this policy's: {self.policy.lora}. Found {checkpoint['lora']}; "
                "use the `policy` settings it was trained with (config.yaml in its run folder)."
            )
        if checkpoint["base_measured"] == self.measured and checkpoint["base_scores"] is not None:
            self.base_scores = checkpoint["base_scores"]
            self.trainer.num_sanity_val_steps = 0  # no need to measure it again
