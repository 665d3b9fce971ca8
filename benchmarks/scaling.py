"""A model of the time of a round on several GPUs, part by part: computed, not measured.

`python -m benchmarks.scaling` counts the work of a round of `configs/sd35m.yaml`, without a GPU and without the weights, and
divides it by assumed rates. Replace these by your own, such as `--tflops 140`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path

from benchmarks.memory import arguments, module_on_a_gpu
from marble_lightning.memory import Estimate, estimate_memory

REWARDS, REFRESH_EVERY, SOURCES = 5, 10, 3
"""Of the published run: rewards, rounds (of one optimizer step each) from one refresh to the next, sources of prompts."""


@dataclass(frozen=True)
class Rates:
    """What is assumed of the machines."""

    tflops: float = 75  # 10^12 floating-point operations a second, sustained by a GPU
    network: float = 25e9  # bytes a second from a GPU to another one, over the slowest link
    latency: float = 2e-5  # seconds of each of the 2 (R - 1) steps of an all-reduce
    host: float = 20e9  # bytes a second from the CPU's memory to a GPU
    disk: float = 1e9  # bytes a second
    ocr: float = 1.1  # seconds of a process for an image
    readers: int = 4  # OCR processes of each GPU


@dataclass(frozen=True)
class Round:
    """A round as published, and the evaluations between rounds."""

    prompts: int = 48
    images: int = 24
    steps: int = 25
    times: int = 24
    held_out: int = 5278
    every: int = 30
    held_out_steps: int = 40


OVERNIGHT = Round(steps=10, times=4, held_out=144, every=60)
"""The rounds of `configs/sd35m_8gpu.yaml`."""


@dataclass(frozen=True)
class Work:
    """Counted TFLOP of a prompt, and of an image's step, decoding, scores and training at one time; counted bytes."""

    encode: float
    step: float
    decode: float
    score: float
    train: float
    encoders: int
    adapter: int


def counted(found: Estimate, size: Round) -> Work:
    """The work of each part, from the estimate of a whole round on one GPU."""
    work = {name: phase.flops / 1e12 for name, phase in found.phases.items()}
    images = size.prompts * size.images
    return Work(
        work["encoding prompts"] / size.prompts, work["sampling"] / images / size.steps, work["decoding"] / images,
        work["scoring"] / images, work["training"] / images / size.times,
        found.parts["text encoders"], found.parts["adapters"] // 3,
    )  # fmt: skip


def seconds(work: Work, size: Round, rates: Rates, ranks: int) -> dict[str, float]:
    """Seconds of the parts of a round; those of an evaluation are spread over the rounds from one to the next.

    Raises:
        ValueError: The prompts cannot be divided among the GPUs.
    """
    if size.prompts % ranks:
        raise ValueError(f"`prompts_per_round` must be a multiple of the number of GPUs, {ranks}. Found {size.prompts}.")
    prompts = size.prompts // ranks
    images = prompts * size.images
    sampling = (prompts * work.encode + images * (size.steps * work.step + work.decode)) / rates.tflops
    reading = ceil(prompts / SOURCES) * size.images * rates.ocr / rates.readers
    sent = 2 * (ranks - 1) / ranks * work.adapter / rates.network * (1 + 2 * REWARDS / REFRESH_EVERY)
    held_out = size.held_out_steps * work.step + work.decode + work.score
    return {
        "sampling": sampling,
        "scoring": images * work.score / rates.tflops + max(0.0, reading - sampling),
        "training": images * size.times * work.train / rates.tflops,
        "communication": sent + 2 * (ranks - 1) * rates.latency * (1 + 1 / REFRESH_EVERY),
        "evaluation": ceil(size.held_out / ranks) * held_out / rates.tflops / size.every,
        "fixed": work.encoders / rates.host + 5 * work.adapter / rates.disk,
    }


def row(work: Work, size: Round, rates: Rates, ranks: int) -> str:
    """A line of the table: seconds of each part and of the round, and the share of a perfect speed-up from one GPU."""
    parts = list(seconds(work, size, rates, ranks).values())
    alone, whole = sum(seconds(work, size, rates, 1).values()), sum(parts)
    cells = [f"{part:.{0 if part >= 100 else 2}f}" for part in (*parts, whole)]
    return f"| {ranks} | {size.prompts} | {' | '.join(cells)} | {alone / whole / ranks:.1%} |"


def main() -> None:
    """Count the work of a round and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16, 64], help="numbers of GPUs")
    for each in fields(Rates):
        parser.add_argument(f"--{each.name}", type=type(each.default), default=each.default)
    options = vars(parser.parse_args())
    ranks_of_rows, rates = options.pop("ranks"), Rates(**options)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        module = module_on_a_gpu(Path(folder), arguments().parse_args([]))
        work = counted(estimate_memory(module), Round())
    print(f"{work}\n{rates}")
    for title, size in {"published": Round(), "overnight": OVERNIGHT}.items():
        print(f"\n| {title}: GPUs | prompts | {' | '.join(seconds(work, size, rates, 1))} | round | efficiency |")
        print("|---" * 10 + "|")
        for ranks in ranks_of_rows:  # where prompts do not divide, a larger round: one of each source on every GPU
            fits = size.prompts % ranks == 0
            print(row(work, size if fits else replace(size, prompts=SOURCES * ranks), rates, ranks))


if __name__ == "__main__":
    main()
