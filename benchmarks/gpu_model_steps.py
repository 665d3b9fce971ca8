"""Steps of `benchmarks.gpu_check` with networks: sampling, micro-batches, whole optimizer steps, resuming and scoring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from benchmarks.gpu_check import Record, Run
from benchmarks.kill_and_resume import fit, last, same, state
from benchmarks.phases import now
from benchmarks.random_rewards import FULL, SMALL, build_rewards, rendered
from benchmarks.random_sd35m import save_random_sd35m, two_rounds
from benchmarks.timed_rounds import EVERY_STEP, K_PASSES, ONE_MICRO_BATCH, SIZES, SUM, WHOLE, Method, Size, Turns, on_gpu
from benchmarks.timed_rounds import run as fit_rounds
from marble_lightning.memory import estimate_memory
from marble_lightning.memory.ledger import bytes_of, tensors_of
from marble_lightning.module import DiffusionNFT
from marble_lightning.tinyworld import WEIGHTS
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer
from marble_lightning.utils.seeds import generator
from rewards import Prompt, Reward

K = 5
"""Rewards of the timed rounds."""
REPEATS = 3
"""Timed calls, after a warm-up."""
SMALL_SIZE = Size(16, 2, 6, 1, "float32", "32-true", steps=2)
KINDS = {
    "plain": SUM,
    "refresh by two passes": EVERY_STEP,
    "refresh by two passes, whole gradients": WHOLE,
    "refresh by K passes": K_PASSES,
}
"""Kinds of micro-batches, by the method whose micro-batches are all of that kind."""


def size_of(run: Run) -> Size:
    """Sizes of sampling and training."""
    return SMALL_SIZE if run.small else SIZES["sd35m"]


def pipeline_of(run: Run) -> Path:
    """Folder of the model; SD3.5-M is drawn if it is not there yet."""
    return WEIGHTS / "sd3" if run.small else save_random_sd35m(run.folder / "sd35m")


def seconds_of(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a first call, and the median of `REPEATS` more."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = now()
        call()
        seconds.append(now() - start)
    return seconds[0], statistics.median(seconds[1:])


def record_speed(run: Run, name: str, images: int, call: Callable[[], object]) -> None:
    """Time a call for so many images; record the seconds of the first call, and the images a second of later ones."""
    first, seconds = seconds_of(call)
    run.record[f"{name}, first batch of {images} images, s"] = first
    run.record[f"{name}, images a second"] = images / seconds


def reset_peak(run: Run) -> int:
    """Reset the peak memory of a CUDA device.

    Returns:
        Bytes that are allocated now; 0 on a CPU.
    """
    if run.device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def record_peak(run: Run, name: str, before: int = 0) -> None:
    """Record the peak of the bytes on a CUDA device since `reset_peak` beyond those of `before`, in MiB."""
    if run.device == "cuda":
        run.record[name] = (torch.cuda.max_memory_allocated() - before) / 2**20


# SD3.5-M ----------------------------------------------------------------------------------------------------------------


def checkpoint(run: Run) -> None:
    """Draw the random model that later steps load."""
    files = [file for file in pipeline_of(run).rglob("*") if file.is_file()]
    run.record["GiB on disk"] = sum(file.stat().st_size for file in files) / 2**30


def sampling(run: Run, compile: bool = False) -> None:
    """Images a second of sampling with the `old` adapter and of decoding."""
    size, steps = size_of(run), 2 if run.small else 25
    policy = size.policy(pipeline_of(run), compile)
    policy.setup(seed=0)
    policy.to(run.device)
    conditions = policy.encode(["a red circle"] * size.batch)

    def sample() -> torch.Tensor:
        noise = [generator("noise", index) for index in range(size.batch)]
        with torch.autocast(run.device, torch.bfloat16, enabled=size.precision == "bf16-mixed"):
            return policy.sample(conditions, noise, "old", steps=steps, solver="dpm2")

    reset_peak(run)
    record_speed(run, f"sampling, {steps} steps", size.batch, sample)
    record_peak(run, "sampling, peak memory, MiB")
    latents = sample()
    reset_peak(run)
    record_speed(run, "decoding", size.batch, lambda: policy.decode(latents))
    record_peak(run, "decoding, peak memory, MiB")


class Kinds(Turns):
    """Records the time, the speed and the peak memory of each method, and at the end the estimates of its memory.

    Args:
        methods: Methods by the name they are recorded under; the first one is what the others are compared with.
        record: What is measured.
        steps: Optimizer steps of a round, of two micro-batches each.
        estimate: Whether the memory of the training is estimated.
    """

    def __init__(self, methods: dict[str, Method], record: Record, steps: int, estimate: bool) -> None:
        super().__init__([(method, K) for method in methods.values()], cycles=1)
        self.names, self.record, self.steps, self.estimate = list(methods), record, steps, estimate

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        index = trainer.current_epoch % len(self.turns)
        name, turn, first, record = self.names[index], self.turns[index], self.turns[0], self.record
        if not self.training[turn]:
            return
        record[f"{name}, {self.steps} optimizer steps, s"] = self.training[turn][0]
        record[f"{name}, s a micro-batch, with its share of the optimizer step"] = self.training[turn][0] / self.steps / 2
        if index:
            paper = f" (paper: {turn[0].paper})" if turn[0].paper else ""
            record[f"{name}, relative speed{paper}"] = self.training[first][0] / self.training[turn][0]
        if on_gpu(trainer):
            record[f"{name}, peak memory of training, MiB"] = self.training_peak[turn]
            if index:
                record[f"{name}, relative peak memory (paper: 1.14)"] = self.training_peak[turn] / self.training_peak[first]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(DiffusionNFT, pl_module)
        if not self.estimate:
            return
        for index, (name, turn) in enumerate(zip(self.names, self.turns, strict=True)):
            self.use(module, index)
            estimated = estimate_memory(module, cuda=on_gpu(trainer)).total("training") / 2**20
            self.record[f"{name}, estimated memory of training, MiB"] = estimated
            if turn in self.training_peak:
                self.record[f"{name}, estimated / measured"] = estimated / self.training_peak[turn]


def micro_batches(run: Run, compile: bool = False) -> None:
    """A micro-batch of each kind, in rounds of two optimizer steps; eager with the estimates of memory."""
    time_rounds(run, KINDS, replace(size_of(run), steps=2), compile, estimate=not compile)


def speeds(run: Run) -> None:
    """Ten optimizer steps of the weighted sum, and of MARBLE that solves on one micro-batch of them."""
    time_rounds(run, {"weighted sum": SUM, "MARBLE, every 10th step, one micro-batch": ONE_MICRO_BATCH}, size_of(run))


def time_rounds(run: Run, methods: dict[str, Method], size: Size, compile: bool = False, estimate: bool = False) -> None:
    """Fit two rounds of each method in turns, the first a warm-up, with rollouts of three solver steps."""
    turns = Kinds(methods, run.record, size.steps, estimate)
    fit_rounds(turns, size, pipeline_of(run), "gpu" if run.device == "cuda" else "cpu", rollout_steps=3, compile=compile)


# Killed and resumed -----------------------------------------------------------------------------------------------------

SHRUNKEN: Mapping[str, object] = {
    "trainer.deterministic": "warn", # otherwise attention's backward pass adds in any order, and no two runs are equal
    "model.policy.resolution": 256, "data.images_per_prompt": 6, "model.sampling.steps": 5, "model.sampling.batch_size": 6,
    "model.sampling.times_per_image": 2, "model.micro_batch_size": 6,
    "model.rewards": "{jpeg: JPEGCompressibility, random: {class_path: benchmarks.timed_rounds.Projection, "
    "init_args: {seed: 0}}}",
}  # fmt: skip
TINY: Mapping[str, object] = {
    "trainer.accelerator": "cpu", "model.policy.resolution": 16, "model.policy.text_length": 1, "model.policy.rank": 2,
    "model.policy.dtype": "float32", "data.images_per_prompt": 2, "model.sampling.times_per_image": 1,
}  # fmt: skip


def resume(run: Run) -> None:
    """Two rounds of a shrunken configs/sd35m.yaml, twice without a stop, and once killed after the first and resumed."""
    record, ends = run.record, {}
    for name in ("whole", "again"):
        status, record[f"{name}, s from its configuration to its end"] = fit_in(run, name)
        ends[name] = end_of(run, name, status)
    record["the same run twice is equal bit for bit"] = same(ends["whole"], ends["again"])
    record["status of the killed run"], _ = fit_in(run, "killed", kill_after=0, since="last.ckpt")
    checkpoint = last(run.folder / "killed")
    record["optimizer steps before the kill"] = state(checkpoint)["global_step"] if checkpoint else 0
    status, _ = fit_in(run, "killed", "--ckpt_path", "last")
    resumed = end_of(run, "killed", status)
    record["optimizer steps at the end"] = resumed["global_step"]
    record["killed and resumed is equal bit for bit"] = same(ends["whole"], resumed)


def fit_in(run: Run, name: str, *more: str, **kill: Any) -> tuple[int, float]:
    """Fit in a folder of that name, see `kill_and_resume.fit`, with further arguments of the command line."""
    folder, options = run.folder / name, {**SHRUNKEN, **(TINY if run.small else {})}
    folder.mkdir(exist_ok=True)
    path = pipeline_of(run) if run.small else save_random_sd35m(run.folder / "two_blocks", layers=2)
    arguments = ["fit", *two_rounds(["sd35m"], path, folder, options), *more]
    return fit(arguments, run.folder / f"{name}.txt", folder, imported=run.device == "cpu", **kill)


def end_of(run: Run, name: str, status: int) -> dict[str, Any]:
    """State of a run's last checkpoint.

    Raises:
        RuntimeError: The run failed.
    """
    file = last(run.folder / name)
    if status or file is None:
        lines = (run.folder / f"{name}.txt").read_text().strip().splitlines()
        raise RuntimeError(f"`fit` must succeed. Found status {status} of the run {name!r}, which ends with {lines[-3:]}.")
    return state(file)


# Rewards ----------------------------------------------------------------------------------------------------------------


def scoring(run: Run) -> None:
    """Images a second and peak memory of a batch of sampling, for each reward and metric of configs/sd35m.yaml.

    With random weights GenEval's detector finds nothing, so its masks and colours take no time here.
    """
    count, side = (2, 64) if run.small else (9, 512)
    tokenizer = train_tokenizer(run.folder / "reward_tokenizer", seed=0)
    torch.manual_seed(0)
    reward_models, metrics = build_rewards(tokenizer, "float32", run.device, SMALL if run.small else FULL)
    prompt = Prompt('a sign that says "Word 0" and a cat', "all", {"include": [{"class": "cat", "count": 1}]})
    images = rendered(count, side).to(run.device)
    for name, reward in {**reward_models, **metrics}.items():
        time_reward(run, name, reward.to(run.device), images, [prompt] * count)
    if find_spec("rapidocr") is None:
        run.record["ocr"] = "not run: rapidocr is not installed"
        return
    from rewards import OCR

    reward = OCR()
    reward.setup()
    time_reward(run, "ocr", reward, images, [prompt] * count)


def time_reward(run: Run, name: str, reward: Reward, images: torch.Tensor, prompts: Sequence[Prompt]) -> None:
    """Record the time and the memory of a reward."""
    before = reset_peak(run)
    record_speed(run, name, len(images), lambda: reward(images=images, prompts=prompts))
    run.record[f"{name}, weights, MiB"] = bytes_of(tensors_of(reward)) / 2**20
    record_peak(run, f"{name}, peak memory beyond all weights, MiB", before)
