"""Prompts to learn on, drawn a round at a time, and held-out prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from marble_lightning.data.prompt_files import distinct, prompt_file, read_prompt_file, read_prompts
from marble_lightning.utils.seeds import generator
from rewards import Prompt
from rewards.files import resolve_path

log = logging.getLogger(__name__)

ALL = "all"
"""What results call all sources together."""


def draw_round(
    pools: Mapping[str, Sequence[Prompt]], shares: Mapping[str, int], turns: int, seed: int, index: int
) -> list[Prompt]:
    """The distinct prompts of one round, sources in turn, each with its share of the turn.

    Args:
        pools: Prompts of each source.
        shares: Prompts of each source in a turn.
        turns: Turns of the round.
        seed: Seed of the run.
        index: Index of the round.
    """
    drawn = {
        source: torch.randperm(len(prompts), generator=generator(seed, index, "prompts", source)).tolist()
        for source, prompts in pools.items()
    }
    return [
        pools[source][drawn[source][turn * share + i]]
        for turn in range(turns)
        for source, share in shares.items()
        for i in range(share)
    ]


class PromptDataModule(LightningDataModule):
    """Prompts to learn on, a round at a time, and held-out prompts to be judged on.

    Args:
        folder: Folder with `train.jsonl` and `test.jsonl`, or with one folder per source in the published formats; see
            `read_prompts`. `package:tinyworld/prompts` is the bundled one. Training prompts that a source has twice count
            once.
        sources: Names of the sources, which share a round equally; or how many prompts of each are drawn in turn,
            {a: 1, b: 2} for twice as many of b.
        prompts_per_round: Distinct prompts of a round over all ranks.
        images_per_prompt: k, images sampled of each prompt of a round.
        cap_per_source: Training prompts used of each source, from the start of the file; None uses all.
        held_out_per_source: Held-out prompts used of each source, from the start of the file; None uses all.
        held_out_images: Images sampled of each held-out prompt.
        held_out_batch_size: Images of held-out prompts, and of `predict`, sampled at once on each process.
        predict_file: Prompts that `predict` makes images of: a .txt with one a line, or a .jsonl like `train.jsonl`, whose
            lines need no `source`; null for the held-out prompts.
        predict_images: Images that `predict` makes of each prompt; null for `held_out_images`.
    """

    def __init__(
        self,
        folder: str,
        sources: list[str] | dict[str, int],
        prompts_per_round: int = 48,
        images_per_prompt: int = 24,
        cap_per_source: int | None = None,
        held_out_per_source: int | None = None,
        held_out_images: int = 1,
        held_out_batch_size: int = 16,
        predict_file: str | None = None,
        predict_images: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(resolve_path(folder))
        self.shares = sources if isinstance(sources, dict) else dict.fromkeys(sources, 1)
        self.prompts_per_round, self.images_per_prompt = prompts_per_round, images_per_prompt
        self.cap_per_source = cap_per_source
        self.held_out_per_source, self.held_out_images = held_out_per_source, held_out_images
        self.held_out_batch_size = held_out_batch_size
        self.predict_file = None if predict_file is None else Path(resolve_path(predict_file))
        self.predict_images = held_out_images if predict_images is None else predict_images
        if not self.shares or len(self.shares) != len(sources) or min(self.shares.values()) < 1:
            raise ValueError(f"`sources` must name at least one source, each once and with a share >= 1. Found {sources}.")
        if ALL in self.shares:
            raise ValueError(f"`sources` must not be called {ALL!r}, the name of all of them in results. Found {sources}.")
        turn = sum(self.shares.values())
        if prompts_per_round % turn:
            raise ValueError(
                f"`prompts_per_round` must be a multiple of the sum of the shares of `sources`, {turn}. "
                f"Found {prompts_per_round}; try {max(1, round(prompts_per_round / turn)) * turn}."
            )
        if images_per_prompt < 2:
            raise ValueError(
                f"`images_per_prompt` must be >= 2: an advantage compares images of one prompt. Found {images_per_prompt}."
            )
        counts = {
            "prompts_per_round": prompts_per_round,
            "cap_per_source": 1 if cap_per_source is None else cap_per_source,
            "held_out_per_source": 1 if held_out_per_source is None else held_out_per_source,
            "held_out_images": held_out_images,
            "held_out_batch_size": held_out_batch_size,
            "predict_images": 1 if predict_images is None else predict_images,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"`{name}` must be >= 1. Found {count}.")
        self.held_out: list[Prompt] = []
        """Held-out prompts, or those of `predict`, each as often as it is sampled."""
        self.pools: dict[str, list[Prompt]] = {}
        """Distinct training prompts of each source, once `setup` has read them for `fit`."""

    def setup(self, stage: str) -> None:
        """Read the prompt files."""
        images = self.predict_images if stage == "predict" else self.held_out_images
        own = self.predict_file if stage == "predict" else None
        self.held_out = [prompt for prompt in self._judged(own) for _ in range(images)]
        if stage != "fit":
            return
        self.pools = {source: self._training(source) for source in self.shares}
        self.turns = self.prompts_per_round // sum(self.shares.values())
        for source, prompts in self.pools.items():
            if len(prompts) < (needed := self.turns * self.shares[source]):
                raise ValueError(
                    f"A round takes {needed} distinct prompts of {source!r}. Found {len(prompts)}; "
                    "lower `prompts_per_round`, raise `cap_per_source` or add prompts."
                )

    def _judged(self, file: Path | None) -> list[Prompt]:
        if file is not None:
            return read_prompt_file(file)
        wanted = slice(self.held_out_per_source)
        return [prompt for source in self.shares for prompt in read_prompts(self.folder, source, "test")[wanted]]

    def _training(self, source: str) -> list[Prompt]:
        prompts = read_prompts(self.folder, source, "train")
        once = distinct(prompts)
        if repeated := len(prompts) - len(once):
            file = prompt_file(self.folder, source, "train")
            rank_zero_only(log.warning)(f"{file}: {repeated} prompts of {source!r} were left out, being there before.")
        return once[: self.cap_per_source]

    @property
    def training(self) -> list[Prompt]:
        """All training prompts."""
        return [prompt for prompts in self.pools.values() for prompt in prompts]

    def round(self, seed: int, index: int, rank: int, ranks: int) -> list[Prompt]:
        """This rank's distinct prompts of a round; ranks share no prompt."""
        share = self.prompts_per_round // ranks  # neighbours, since sources take turns
        return draw_round(self.pools, self.shares, self.turns, seed, index)[rank * share : (rank + 1) * share]

    def train_dataloader(self) -> Iterable[Any]:
        """The micro-batches of a round, from the module that samples it: Lightning asks here when there is a data module."""
        return self.trainer.lightning_module.train_dataloader()  # type: ignore[union-attr]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to move: micro-batches are cut where the round is, prompts are text."""
        return batch

    def held_out_dataloader(self) -> DataLoader[tuple[int, Prompt]]:
        """This rank's batches of (index, prompt); the index names the image's noise, whatever the batches.

        Ranks share no image, and may have one batch more or less than others.
        """
        numbered = list(enumerate(self.held_out))
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        share = UnrepeatedDistributedSampler(numbered, num_replicas=ranks, rank=rank, shuffle=False)
        return DataLoader(numbered, batch_size=self.held_out_batch_size, sampler=share, collate_fn=list)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = held_out_dataloader


def get_datamodule(trainer: Trainer) -> PromptDataModule:
    """The trainer's PromptDataModule."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, PromptDataModule):
        raise ValueError(f"The trainer must be given a PromptDataModule. Found {type(data).__name__}.")
    return data
