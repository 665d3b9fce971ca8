"""Training prompts, drawn one round at a time, and held-out prompts."""

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
from marble_lightning.utils.run_files import ALL
from marble_lightning.utils.seeds import generator
from rewards import Prompt
from rewards.files import resolve_path

log = logging.getLogger(__name__)


def draw_round(
    pools: Mapping[str, Sequence[Prompt]], shares: Mapping[str, int], turns: int, seed: int, index: int
) -> list[Prompt]:
    """Draw the distinct prompts of one round; the sources alternate, each with its share of prompts per turn.

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
    """Training prompts, drawn one round at a time, and held-out prompts for evaluation.

    Args:
        folder: Folder with `train.jsonl` and `test.jsonl`, or with one folder per source in the published formats; see
            `read_prompts`. `package:tinyworld/prompts` is the bundled one. Duplicate training prompts of a source count
            once.
        sources: Names of the sources, with equal shares of a round; or the shares by name, e.g. {a: 1, b: 2} for twice as
            many prompts of b.
        prompts_per_round: Distinct prompts of a round over all ranks.
        images_per_prompt: k, images sampled for each prompt of a round.
        cap_per_source: Training prompts used of each source, from the start of the file; null uses all.
        held_out_per_source: Held-out prompts used of each source, from the start of the file; null uses all.
        held_out_images: Images sampled for each held-out prompt.
        held_out_batch_size: Images of held-out prompts, and of `predict`, sampled at once on each process.
        predict_file: Prompts for which `predict` generates images: a .txt with one per line, or a .jsonl like
            `train.jsonl`, where `source` is optional; null for the held-out prompts.
        predict_images: Images that `predict` generates for each prompt; null for `held_out_images`.
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
        """Held-out prompts, or those of `predict`, with one entry per image."""
        self.pools: dict[str, list[Prompt]] = {}
        """Distinct training prompts of each source, after `setup` for `fit`."""

    def setup(self, stage: str) -> None:
        """Read the prompt files."""
        images = self.predict_images if stage == "predict" else self.held_out_images
        file = self.predict_file if stage == "predict" else None
        self.held_out = [prompt for prompt in self._read_held_out(file) for _ in range(images)]
        if stage != "fit":
            return
        self.pools = {source: self._read_training(source) for source in self.shares}
        self.turns = self.prompts_per_round // sum(self.shares.values())
        for source, prompts in self.pools.items():
            if len(prompts) < (needed := self.turns * self.shares[source]):
                raise ValueError(
                    f"A round takes {needed} distinct prompts of {source!r}. Found {len(prompts)}; "
                    "lower `prompts_per_round`, raise `cap_per_source` or add prompts."
                )

    def _read_held_out(self, file: Path | None) -> list[Prompt]:
        if file is not None:
            return read_prompt_file(file)
        cap = self.held_out_per_source
        return [prompt for source in self.shares for prompt in read_prompts(self.folder, source, "test")[:cap]]

    def _read_training(self, source: str) -> list[Prompt]:
        prompts = read_prompts(self.folder, source, "train")
        unique = distinct(prompts)
        if repeated := len(prompts) - len(unique):
            file = prompt_file(self.folder, source, "train")
            rank_zero_only(log.warning)(f"{file}: {repeated} prompts of {source!r} were left out as duplicates.")
        return unique[: self.cap_per_source]

    @property
    def training(self) -> list[Prompt]:
        """All training prompts."""
        return [prompt for prompts in self.pools.values() for prompt in prompts]

    def round(self, seed: int, index: int, rank: int, ranks: int) -> list[Prompt]:
        """This rank's distinct prompts of a round; ranks share no prompt."""
        share = self.prompts_per_round // ranks  # consecutive prompts, since the sources alternate
        return draw_round(self.pools, self.shares, self.turns, seed, index)[rank * share : (rank + 1) * share]

    def train_dataloader(self) -> Iterable[Any]:
        """The micro-batches of a round, from the module that samples it: with a data module, Lightning calls this one."""
        return self.trainer.lightning_module.train_dataloader()  # type: ignore[union-attr]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged: micro-batches are on the device of the round already, and prompts are text."""
        return batch

    def held_out_dataloader(self) -> DataLoader[tuple[int, Prompt]]:
        """This rank's batches of (index, prompt); the index seeds the image's noise, independently of the batches.

        Ranks share no image, and the number of batches may differ by one between ranks.
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
