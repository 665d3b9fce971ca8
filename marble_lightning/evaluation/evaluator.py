"""How a policy is judged: held-out prompts sampled with noise of their own and scored, for the base and the trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import CatMetric

from marble_lightning.callback_checks import check_callbacks
from marble_lightning.checkpoints.content import TO_EVALUATE, TO_FIT, must_be_of_fit
from marble_lightning.checkpoints.files import WholeCheckpointIO, warn
from marble_lightning.checkpoints.round_start import RoundStart
from marble_lightning.checkpoints.signals import end_if_asked, is_asked
from marble_lightning.checks import (
    enough_held_out_prompts,
    every_prompt_can_be_judged,
    prompts_without_a_score,
    the_data,
    the_precision,
)
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.evaluation.statistics import by_tag, per_prompt
from marble_lightning.nft.divergence import Finite
from marble_lightning.policies.base import Conditions, FlowPolicy, is_adapter, joined
from marble_lightning.run_folder import run_folder
from marble_lightning.scoring.scorer import Scorer, exit_is_failure
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.loggers import log_metrics
from marble_lightning.utils.seeds import derived_seed, generator
from rewards import Prompt, Reward
from rewards.texts import excerpt

log = logging.getLogger(__name__)

AHEAD = 64
"""Held-out prompts that are encoded in one visit of the text encoders, which for SD3.5 are gigabytes to move."""

HeldOut = list[tuple[int, Prompt]]
"""A batch of held-out prompts, each with the index that names its noise."""


class HeldOutEvaluation(LightningModule):
    """A policy and its judges: what `validate` and `predict` need, and `fit` before and after.

    Args:
        policy: The model that is judged, with the adapter it says.
        rewards: Rewards it learns, by the name they are logged under.
        metrics: Rewards that are only measured.
        scoring: What happens where one of them fails.
        evaluation: How held-out prompts are sampled.
        seed: Seed of their noise, where `evaluation` has none.
    """

    strict_loading = False  # checkpoints hold the adapters only; `on_load_checkpoint` checks that they are all there

    def __init__(
        self,
        policy: FlowPolicy,
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
        """The same of the policy's adapter, from the last validation."""
        self.scores_predictions = True
        """Whether `predict` scores its pictures; to be set before `setup`."""
        self.ahead: dict[str, Conditions] = {}
        """Encoded held-out prompts, of this batch and of those that follow, on the CPU."""
        self.run_config: str | None = None
        """The run's configuration as YAML, where there is one, to be kept in checkpoints."""
        self.round_start = RoundStart()
        self.finite = Finite()

    def check(self, stage: str) -> None:
        """Check settings and prompts, of which the data module knows by now; loads and writes nothing."""
        data = the_data(self.trainer)
        the_precision(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a plugin of the user's
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.asked = self._asked(stage, data.held_out)
        if stage != "fit" or self.trainer.limit_val_batches:
            enough_held_out_prompts(self.trainer)
        every_prompt_can_be_judged(self.asked, data.held_out)
        self.policy.check()
        if self.evaluation.resolution is not None:
            self.policy.check_resolution("model.evaluation.resolution", self.evaluation.resolution)
        if self.evaluation.resolution is None or stage == "fit":
            self.policy.check_resolution("model.policy.resolution", self.policy.resolution)

    def setup(self, stage: str) -> None:
        """Check, then load the weights of the policy and of those judges that are asked."""
        self.check(stage)
        data = the_data(self.trainer)
        self.policy.setup(self.seed)
        for name, judge in self.asked.items():
            with exit_is_failure(name):
                judge.setup()
            judge.requires_grad_(False)
        self.scorer.stopping = partial(is_asked, self.trainer)
        self.scorer.setup(run_folder(self.trainer), f"_{self.trainer.global_rank}" if self.trainer.world_size > 1 else "")
        # Nothing here has buffers that change. Rewards may be elsewhere, where ranks cannot send each other theirs.
        constant = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constant)
        if self.trainer.is_global_zero:
            prompts = list({id(prompt): prompt for prompt in data.training + data.held_out}.values())  # each once
            self._tell_of_cut_prompts([prompt.text for prompt in prompts])
            for sentence in prompts_without_a_score(self.asked, prompts):
                log.warning(sentence)

    def _tell_of_cut_prompts(self, texts: list[str]) -> None:
        if cut := self.policy.too_long(dict.fromkeys(texts)):
            log.warning(
                f"The CLIP text encoders do not read the end of {len(cut)} of {len(set(texts))} prompts, which have more "
                f"than {self.policy.most_tokens} tokens. For example {excerpt(cut[0])}."
            )

    @property
    def judges(self) -> dict[str, Reward]:
        """Rewards and metrics: what held-out pictures are scored by."""
        return cast(dict[str, Reward], {**dict(self.rewards.items()), **dict(self.metrics.items())})

    def metric_names(self) -> set[str]:
        """Names of the metrics that every validation logs."""
        prompts = the_data(self.trainer).held_out
        scored = {name: judge for name, judge in self.judges.items() if any(map(judge.judges, prompts))}
        tags = by_tag(scored, prompts, torch.zeros(len(prompts), len(scored)))
        return {f"held_out/{name}" for name in (*scored, *tags)}

    def _asked(self, stage: str, prompts: list[Prompt]) -> dict[str, Reward]:
        """All judges; those that apply to any prompt for `predict`, none if it does not score."""
        if stage != "predict":
            return self.judges
        wanted = self.judges if self.scores_predictions else {}
        return {name: judge for name, judge in wanted.items() if any(map(judge.judges, prompts))}

    @property
    def settings(self) -> dict[str, Any]:
        """How held-out prompts are sampled, with the values that `evaluation` leaves to policy and run."""
        own = asdict(self.evaluation)
        defaults = {"resolution": self.policy.resolution, "seed": self.seed}
        return own | {name: value for name, value in defaults.items() if own[name] is None}

    @property
    def judged_adapter(self) -> str:
        """The adapter that is judged, `none` where nothing was trained: a new adapter changes nothing."""
        trained = self.trainer.state.fn == "fit" or self.trainer.ckpt_path or self.policy.init_lora
        return self.policy.adapter if self.policy.adapter and trained else "none"

    @property
    def measured(self) -> str:
        """What the base's scores on held-out prompts depend on; a checkpoint's are taken over only where it is the same."""
        model = self.policy.identity | {"init_lora": self.policy.init_lora}
        judges = {name: judge.identity for name, judge in self.judges.items()}
        prompts = derived_seed(*map(repr, the_data(self.trainer).held_out))
        return repr((model, self.trainer.precision, self.settings, judges, prompts))

    def predict_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        """Sample prompts with the policy's adapter, each with noise of its own; score the pictures, (image, judge asked)."""
        images = self.sample_held_out(batch)
        self.scorer.submit(images, [prompt for _, prompt in batch], self.asked)
        return {"images": images, "scores": self.scorer.collect() if self.asked else images.new_empty(len(images), 0)}

    def validation_step(self, batch: HeldOut, batch_idx: int) -> dict[str, Tensor]:
        """As `predict_step`, and remember the scores."""
        pictures = self.predict_step(batch, batch_idx)
        indices = torch.tensor([index for index, _ in batch], device=self.device, dtype=torch.float32)
        self.held_out_scores.update(torch.cat([indices[:, None], pictures["scores"]], dim=1))
        return pictures

    test_step = validation_step

    def sample_held_out(self, batch: HeldOut) -> Tensor:
        """Pictures of prompts; the index names the noise."""
        conditions, empty = self._encoded(batch)
        options = self.settings
        seed = options.pop("seed")
        noise = [generator(seed, "held-out", index) for index, _ in batch]
        base = self.trainer.sanity_checking and self.policy.init_lora is None  # also where a run is resumed
        adapter = None if base else self.policy.adapter
        latents = self.policy.sample(conditions, noise, adapter, unconditional=empty, **options)
        images = self.policy.decode(latents)
        self.finite.note(latents, images)
        return images

    def _check_pictures(self) -> None:
        trained = not self.trainer.sanity_checking and self.judged_adapter != "none"
        self.finite.check_pictures(self.trainer.strategy, trained)

    def _encoded(self, batch: HeldOut) -> tuple[Conditions, Conditions | None]:
        """The encoded prompts of a batch, and the empty one where guidance needs it.

        Text encoders visit the device once for `AHEAD` of this rank's prompts, while rewards leave it to them.
        """
        texts, empty = [prompt.text for _, prompt in batch], [""] if self.evaluation.guidance > 1 else []
        if any(text not in self.ahead for text in texts + empty):
            self.scorer.release()
            own = the_data(self.trainer).held_out[batch[0][0] :: self.trainer.world_size]  # as its loader deals
            wanted = list(dict.fromkeys(empty + texts + [prompt.text for prompt in own]))
            wanted = wanted[: max(AHEAD, len(empty + texts))]
            encoded = self.policy.encode(wanted)
            parts = zip(encoded.embeds.cpu().split(1), encoded.pooled.cpu().split(1), strict=True)
            self.ahead = dict(zip(wanted, map(Conditions, *zip(*parts, strict=True)), strict=True))
        found = joined([self.ahead[text] for text in texts], self.policy.device)
        return found, joined([self.ahead[text] for text in empty], self.policy.device) if empty else None

    def on_validation_epoch_end(self) -> None:
        end_if_asked(self.trainer)  # some scores may have been given up
        data = the_data(self.trainer)
        prompts = data.held_out[:: data.held_out_images]
        scores = per_prompt(self.held_out_scores.compute().cpu(), len(prompts), data.held_out_images)
        self.held_out_scores.reset()
        self._check_pictures()
        skipped = self.scorer.check(self.trainer.strategy)
        self.scorer.release()
        if self.trainer.sanity_checking:
            self.base_scores = scores
        else:
            self.trained_scores = scores
        columns = {**dict(zip(self.judges, scores.T, strict=True)), **by_tag(self.judges, prompts, scores)}
        # numbers, not these tensors of the CPU: the log averages over ranks where a tensor lies, and NCCL knows GPUs only
        means = {f"held_out/{name}": float(column.nanmean()) for name, column in columns.items() if not column.isnan().all()}
        means |= {f"skipped/held_out/{name}": float(count) for name, count in skipped.items() if count}
        if not self.trainer.sanity_checking:
            self.log_dict(means, sync_dist=True)
        else:
            log_metrics(self.trainer, means, step=0)
        self.round_start.judged(self.trainer)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self) -> None:
        end_if_asked(self.trainer)
        self._check_pictures()
        self.scorer.check(self.trainer.strategy)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, never the frozen weights; in the middle of a round, those of its beginning."""
        adapters = {name: tensor for name, tensor in checkpoint["state_dict"].items() if is_adapter(name)}
        checkpoint["state_dict"], checkpoint["lora"] = adapters, self.policy.lora
        checkpoint["base_scores"], checkpoint["base_measured"] = self.base_scores, self.measured
        checkpoint["base_model"], checkpoint["rewards"] = self.policy.identity, list(self.rewards)
        checkpoint["config"] = self.run_config
        self.round_start.put_into(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that the checkpoint's adapters are this policy's, and that its base was measured as ours would be."""
        if self.policy.adapter is None:
            raise ValueError(
                "`ckpt_path` must be null where `policy.adapter` is none: a checkpoint holds adapters, and none is used. "
                f"Found {self.trainer.ckpt_path}; choose the adapter ema or trained to judge it."
            )
        must_be_of_fit(checkpoint, TO_FIT if self.trainer.state.fn == "fit" else TO_EVALUATE, self.trainer.ckpt_path)
        own, theirs = self._shapes(self.state_dict()), self._shapes(checkpoint["state_dict"])
        odd = sorted(set(own.items()) ^ set(theirs.items()))
        kept, asked = checkpoint["lora"], self.policy.lora
        # targets written otherwise, as `to_q` and `attn.to_q`, may name the same layers
        if any(kept[name] != asked[name] for name in ("rank", "alpha")) or (odd and kept["targets"] != asked["targets"]):
            raise ValueError(
                f"The checkpoint must hold adapters like this policy's: {self.policy.lora}. Found {checkpoint['lora']}; "
                "use the `policy` settings it was trained with (config.yaml in its run folder)."
            )
        if odd:
            name = odd[0][0]
            raise ValueError(
                f"The checkpoint must hold the adapters of {self.policy.path}. Found another model's, of "
                f"{checkpoint['base_model'].get('model')}: {name} is {theirs.get(name, 'missing')} instead of "
                f"{own.get(name, 'missing')}; use the `policy.path` it was trained with."
            )
        if checkpoint["base_model"] != self.policy.identity:
            warn(f"The checkpoint was trained on {checkpoint['base_model']}, and this policy is {self.policy.identity}.")
        if checkpoint["base_measured"] == self.measured and checkpoint["base_scores"] is not None:
            self.base_scores = checkpoint["base_scores"]
            self.trainer.num_sanity_val_steps = 0  # no need to measure it again
        elif self.policy.init_lora is not None and self.trainer.state.fn == "fit":
            self.trainer.num_sanity_val_steps = 0
            warn("No base is measured: this run began at `policy.init_lora`, which a checkpoint's adapters now replace.")

    @staticmethod
    def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in state.items() if is_adapter(name)}
