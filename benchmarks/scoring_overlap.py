"""Time that scoring adds to a round when it runs during sampling: `python -m benchmarks.scoring_overlap`.

On the bundled tiny model, a reward sleeps for as long as a batch takes to sample, like a reward on a busy server. Rounds
without this reward, with scoring during sampling and with scoring after sampling alternate in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from balancers import WeightedSum
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from rewards import Reward

TURNS = ("sampling alone", "scored meanwhile", "scored afterwards")


class Sleeper(Reward):
    """A reward that sleeps for `seconds` per batch."""

    seconds = 0.0

    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        time.sleep(self.seconds)
        return images.mean((1, 2, 3))


class Turns(Callback):
    """Alternates between the ways of scoring, and records the seconds from a round's start to its last score.

    Args:
        sleeper: The reward.
        batches: Batches of a round.
        rounds: Rounds of the run; the first of each way is a warm-up.
    """

    def __init__(self, sleeper: Sleeper, batches: int, rounds: int) -> None:
        self.sleeper, self.batches = sleeper, batches
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.bar = tqdm(total=rounds, desc="Rounds, the first of each a warm-up")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scorer, turn = cast(DiffusionNFT, pl_module).scorer, TURNS[trainer.current_epoch % len(TURNS)]
        alone = self.seconds[TURNS[0]]
        self.sleeper.seconds = 0.0 if turn == TURNS[0] else statistics.median(alone) / self.batches
        scorer.settings = replace(scorer.settings, overlap=turn == TURNS[1])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        seconds = float(metrics["time/sampling"] + metrics["time/waiting_for_scores"])
        self.seconds[TURNS[trainer.current_epoch % len(TURNS)]].append(seconds)
        self.bar.update()


def main() -> None:
    """Time the ways of scoring and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batches", type=int, default=8, help="batches of a round; the run always waits for the last one's scores"
    )
    parser.add_argument("--cycles", type=int, default=5, help="measured rounds of each way, after a warm-up")
    options = parser.parse_args()
    for known in QUIET:
        warnings.filterwarnings("ignore", known)

    rounds, images = len(TURNS) * (options.cycles + 1), 24
    sleeper = Sleeper(batch_size=images)
    turns = Turns(sleeper, options.batches, rounds)
    module = DiffusionNFT(
        SD3Policy(str(WEIGHTS / "sd3"), resolution=64, rank=16, alpha=32, text_length=1, dtype="float32"),
        rewards={"sleeper": sleeper},
        sampling=Sampling(steps=8, batch_size=images, times_per_image=1),
        scoring=Scoring(),
        micro_batch_size=images,
    )
    prompts = images * options.batches // 6
    data = PromptDataModule(str(PROMPTS), ["pickscore"], prompts_per_round=prompts, images_per_prompt=6)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=rounds, callbacks=[WeightedSum(), turns], limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)

    print(f"\n{options.batches} batches a round, the reward sleeps as long as a batch takes to sample\n")
    print("| | seconds | times sampling alone | spread |\n|---|---|---|---|")
    measured = {turn: seconds[1:] for turn, seconds in turns.seconds.items()}
    for turn in TURNS:
        ratios = [seconds / alone for seconds, alone in zip(measured[turn], measured[TURNS[0]], strict=True)]
        print(
            f"| {turn} | {statistics.median(measured[turn]):.2f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
