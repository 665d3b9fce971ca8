"""Time of optimizer steps with several methods that merge K rewards, alternating in one run, relative to the weighted sum.

`python -m benchmarks.training_speed` uses the bundled tiny model, `--model sd35m` the full architecture of Stable
Diffusion 3.5 Medium with random weights (512 px, LoRA 32, micro-batches of 9; for a GPU). The unit of measurement is a
round of ten optimizer steps, so that a method that solves every ten steps solves once per round.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from balancers import MARBLE, Balancer, WeightedSum
from benchmarks.random_sd35m import save_random_sd35m
from marble_lightning.cli import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from rewards import Reward

STEPS = 10
"""Optimizer steps of a round."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    paper: str
    every: int | None = None
    """Optimizer steps between two solutions; None for the weighted sum."""
    passes: Literal["two", "per_reward"] = "two"
    share: float = 1.0
    """Share of a step's two micro-batches whose gradients the solution uses; it applies to both."""
    gram: Literal["own", "split"] | None = "own"
    """Products to solve on; None: of whole gradients, without the parts from halves of the prompts."""

    def balancer(self) -> Balancer:
        """A new balancer."""
        if self.every is None:
            return WeightedSum()
        options: dict[str, Any] = {"measure_signal": False} if self.gram is None else {"gram": self.gram, "gram_decay": 0.9}
        return MARBLE(refresh_every=self.every, estimate_share=self.share, **options)


EVERY_STEP = Method("MARBLE, every step", "", every=1)
WHOLE = Method("MARBLE, every step, whole gradients", "", every=1, gram=None)
SPLIT = Method("MARBLE, every step, gram: split", "", every=1, gram="split")
METHODS = (
    Method("weighted sum", "1.00"),
    Method("MARBLE, every 10th step", "", every=10),
    Method("MARBLE, every 10th step, half its images", "0.97 (one micro-batch)", every=10, share=0.5),
    EVERY_STEP,
    SPLIT,
    WHOLE,
    Method("MARBLE, every step, half its images", "", every=1, share=0.5),
    Method("MARBLE, every step, K passes", "0.56 (K = 5)", every=1, passes="per_reward", gram=None),
)
"""Two backward passes, and gradients in two parts (`measure_signal`), unless the title says otherwise."""


class Projection(Reward):
    """A reward with negligible cost: the projection of the image's pixels on a random direction."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        return images.flatten(1) @ torch.randn(images[0].numel(), generator=draw).to(images.device)


class Turns(Callback):
    """Uses the next (method, number of rewards) in every round, and records its times.

    Args:
        turns: Methods and numbers of rewards that alternate.
        cycles: Full cycles to run, after a warm-up cycle.
    """

    def __init__(self, turns: list[tuple[Method, int]], cycles: int) -> None:
        self.turns, self.rounds = turns, (cycles + 1) * len(turns)
        self.balancers = [method.balancer() for method, _ in turns]
        self.training: dict[tuple[Method, int], list[float]] = defaultdict(list)
        self.whole: dict[tuple[Method, int], list[float]] = defaultdict(list)
        self.peak: dict[tuple[Method, int], float] = {}

    def complete(self) -> int:
        """Number of measured cycles in which every turn has a time; those of an unfinished cycle are dropped."""
        cycles = min(len(self.training[turn]) for turn in self.turns)
        for times in (self.training, self.whole):
            for turn in self.turns:
                del times[turn][cycles:]
        return cycles

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(DiffusionNFT, pl_module)
        self.taps, self.rewards = module.step.per_reward.taps, dict(module.rewards.items())
        self.bar = tqdm(total=self.rounds, desc="Rounds, the first of each a warm-up", dynamic_ncols=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, index = cast(DiffusionNFT, pl_module), trainer.current_epoch % len(self.turns)
        method, k = self.turns[index]
        module.rewards = nn.ModuleDict(dict(list(self.rewards.items())[:k]))
        module.balancer = self.balancers[index]
        module.step.per_reward.taps = self.taps if method.passes == "two" else None
        module.balancer.bind(list(module.rewards))
        if on_gpu(trainer):
            torch.cuda.reset_peak_memory_stats()
        self.start = now(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.sampled = now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end, turn = now(trainer), self.turns[trainer.current_epoch % len(self.turns)]
        if trainer.current_epoch >= len(self.turns):
            self.training[turn].append(end - self.sampled)
            self.whole[turn].append(end - self.start)
        if on_gpu(trainer):
            self.peak[turn] = torch.cuda.max_memory_allocated() / 2**20
        self.bar.set_postfix_str(f"{turn[0].title}, K = {turn[1]}: {end - self.sampled:.1f} s")
        self.bar.update()


def on_gpu(trainer: Trainer) -> bool:
    """Whether the run's model is on a CUDA device."""
    return trainer.strategy.root_device.type == "cuda"


def now(trainer: Trainer) -> float:
    """Time in seconds, after synchronising the device."""
    if on_gpu(trainer):
        torch.cuda.synchronize()
    return time.perf_counter()


def run(turns: Turns, model: str, path: Path, device: str, rollout_steps: int) -> None:
    """Fit `turns.rounds` rounds."""
    tiny = model == "tiny"
    resolution, rank, batch = (64, 16, 24) if tiny else (512, 32, 9)
    module = DiffusionNFT(
        SD3Policy(
            str(path), resolution=resolution, rank=rank, alpha=2 * rank, text_length=1 if tiny else 128,
            dtype="float32" if tiny else "bfloat16",
        ),
        rewards={f"reward_{index}": Projection(index) for index in range(max(k for _, k in turns.turns))},
        sampling=Sampling(steps=rollout_steps, batch_size=batch, times_per_image=2),
        micro_batch_size=batch,
        optimizer_steps_per_round=STEPS,
    )  # fmt: skip
    prompts = batch * STEPS // 6
    data = PromptDataModule(str(PROMPTS), ["pickscore"], prompts_per_round=prompts, images_per_prompt=6)
    trainer = Trainer(
        accelerator=device, devices=1, max_epochs=turns.rounds, callbacks=[WeightedSum(), turns], limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, precision="32-true" if tiny else "bf16-mixed",
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


def peak_of_a_process(method: Method, k: int, arguments: list[str]) -> float:
    """Peak resident memory in MiB of a process that runs only this turn."""
    command = [sys.executable, "-m", "benchmarks.training_speed", *arguments, "--alone", str(METHODS.index(method)), str(k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(turns: Turns) -> str:
    """Median speed (above 1 is faster) and peak memory, as ratios to those of the weighted sum with the same K."""
    lines = [
        "| method | K | seconds | speed, steps only | spread | speed, with rollout | peak memory | paper's speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for turn in turns.turns:
        method, k = turn
        plain = (METHODS[0], k)
        training, whole = (statistics.median(times[turn]) for times in (turns.training, turns.whole))
        ratios = [a / b for a, b in zip(turns.training[plain], turns.training[turn], strict=True)]
        speed = statistics.median(turns.training[plain]) / training
        together = statistics.median(turns.whole[plain]) / whole
        memory = f"{turns.peak[turn] / turns.peak[plain]:.2f}" if turn in turns.peak else "-"
        lines.append(
            f"| {method.title} | {k} | {training:.2f} | {speed:.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {together:.2f} | {memory} | {method.paper} |"
        )
    for k in sorted({k for method, k in turns.turns if {(SPLIT, k), (WHOLE, k)} <= turns.training.keys()}):
        ratios = [a / b for a, b in zip(turns.training[SPLIT, k], turns.training[WHOLE, k], strict=True)]
        lines.append(f"\n`gram: split` takes {statistics.median(ratios):.2f} times the time of whole gradients, K = {k}.")
    if {(EVERY_STEP, 5), (EVERY_STEP, 20)} <= turns.training.keys():
        growth = statistics.median(turns.training[EVERY_STEP, 20]) / statistics.median(turns.training[EVERY_STEP, 5])
        lines.append(f"\n{EVERY_STEP.title}: a step with 20 rewards takes {growth:.2f} times one with 5.")
    return "\n".join(lines)


def main() -> None:
    """Time the methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "sd35m"], default="tiny")
    parser.add_argument("--rewards", nargs="+", type=int, default=[2, 5, 10, 20], help="numbers of rewards K")
    parser.add_argument("--cycles", type=int, default=5, help="measured rounds of each method and K")
    parser.add_argument("--device", default="auto", help="Lightning's accelerator")
    parser.add_argument("--folder", type=Path, help="folder of the random sd35m; default a temporary folder")
    parser.add_argument("--layers", type=int, default=24, help="blocks of the random sd35m")
    parser.add_argument("--rollout-steps", type=int, help="solver steps of a rollout; default 8 for tiny, 25 for sd35m")
    parser.add_argument("--memory", nargs="*", type=int, help="numbers K for which CPU memory is measured too; default all")
    parser.add_argument("--alone", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rollout_steps = options.rollout_steps or (8 if options.model == "tiny" else 25)
    for known in QUIET:
        warnings.filterwarnings("ignore", known)

    with tempfile.TemporaryDirectory() as temporary:
        path = WEIGHTS / "sd3"
        if options.model == "sd35m":
            path = save_random_sd35m(options.folder or Path(temporary) / "sd35m", options.layers)
        if options.alone:
            run(
                Turns([(METHODS[options.alone[0]], options.alone[1])], cycles=0),
                options.model,
                path,
                options.device,
                rollout_steps,
            )
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return
        turns = Turns([(method, k) for k in options.rewards for method in METHODS], options.cycles)
        if options.device == "cpu" or not torch.accelerator.is_available():
            # Peak memory needs a separate process for each turn. These run first, so that a failure loses no timings.
            arguments = ["--model", options.model, "--device", options.device, "--folder", str(path)]
            arguments += ["--rollout-steps", "3"]  # for two times to train on; more need time, not memory
            measured = options.rewards if options.memory is None else options.memory
            for turn in tqdm([turn for turn in turns.turns if turn[1] in measured], desc="Memory"):
                turns.peak[turn] = peak_of_a_process(turn[0], turn[1], arguments)
        try:
            run(turns, options.model, path, options.device, rollout_steps)
        finally:  # an interrupted run has measured something, too
            cycles, where = turns.complete(), f"{torch.get_num_threads()} threads, {gpu_name()}"
            if cycles:
                print(f"\n{options.model}, {where}, {cycles} cycles\n\n{table(turns)}")


def gpu_name() -> str:
    """The GPU's name, or "no GPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
