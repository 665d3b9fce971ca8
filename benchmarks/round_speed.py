"""Durations of the phases of a round, compared with DiffusionNFT's loop: `python -m benchmarks.round_speed`.

Both train on the same prompts with the same sizes, solver and rewards, and their rounds alternate within one process.
Options are passed to `fit`, e.g. `--model.policy.compile true`, `-c balancers/weighted_sum`, or `-c sd35m` with a path.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from balancers import Balancer
from benchmarks.diffusion_nft_loop import DiffusionNFTLoop
from benchmarks.phases import PHASES, Phases, now
from marble_lightning.command_line import command_line
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.sd3 import SD3Policy

DEFAULT = ("-c", "tiny")


class Alternation(Callback):
    """After each round of the trainer, runs a round of `DiffusionNFTLoop` on the same prompts.

    Args:
        cycles: Measured rounds, after a warm-up.
    """

    def __init__(self, cycles: int) -> None:
        self.phases, self.times = Phases(), {name: defaultdict[str, list[float]](list) for name in ("ours", "theirs")}
        self.bar = tqdm(total=cycles + 1, desc="Rounds of both loops, the first a warm-up")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(DiffusionNFT, pl_module)
        policy, data = cast(SD3Policy, module.policy), get_datamodule(trainer)
        for name, phase in (("encode", "encode"), ("sample", "sample"), ("decode", "decode")):
            setattr(policy, name, self._timed(getattr(policy, name), phase))
        precision = str(trainer.precision)
        half = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
        rewards, device = module.rewards, trainer.strategy.root_device
        self.loop = DiffusionNFTLoop(module, policy, rewards, data.images_per_prompt, device, half, Phases())

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phases(phase):
                return function(*arguments, **options)

        return timed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = now()  # callbacks run before the module, which then samples and trains

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics, module = trainer.callback_metrics, cast(DiffusionNFT, pl_module)
        whole = now() - self.start
        by_phase = self.phases.take()
        by_phase |= {"score": float(metrics["time/waiting_for_scores"]), "train": float(metrics["time/training"])}
        self._record("ours", by_phase, whole)

        start = now()
        self.loop.round(get_datamodule(trainer).round(module.seed, trainer.current_epoch, 0, 1))
        self._record("theirs", self.loop.phases.take(), now() - start)
        self.bar.update()

    def _record(self, loop: str, by_phase: dict[str, float], whole: float) -> None:
        if self.bar.n:  # not the warm-up
            for phase, seconds in (*by_phase.items(), ("round", whole)):
                self.times[loop][phase].append(seconds)


def table(times: dict[str, defaultdict[str, list[float]]]) -> str:
    """Medians of both loops and the speed-up, with its spread over rounds."""
    lines = ["| phase | DiffusionNFT's loop, s | ours, s | ours is faster by | spread |", "|---|---|---|---|---|"]
    for phase in (*PHASES, "round"):
        theirs, ours = times["theirs"][phase], times["ours"][phase]
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        lines.append(
            f"| {phase} | {statistics.median(theirs):.2f} | {statistics.median(ours):.2f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """Time both loops and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5, help="measured rounds of each loop, after a warm-up")
    options, extra = parser.parse_known_args(None if arguments is None else list(arguments))
    rounds = str(options.cycles + 1)
    chosen = extra if "-c" in extra and "balancers" not in extra[extra.index("-c") + 1] else [*DEFAULT, *extra]
    cli = command_line(
        [
            *chosen, "--trainer.max_epochs", rounds, "--trainer.check_val_every_n_epoch", rounds,
            "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false",
            "--trainer.enable_progress_bar", "false",
        ],
        run=False,
    )  # fmt: skip
    alternation = Alternation(options.cycles)
    kept = [callback for callback in cli.trainer.callbacks if isinstance(callback, Balancer)]  # type: ignore[attr-defined]
    cli.trainer.callbacks = [*kept, alternation]  # type: ignore[attr-defined] # nothing is written or shown
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    print(f"\n{' '.join(chosen)}\n\n{table(alternation.times)}")


if __name__ == "__main__":
    main()
