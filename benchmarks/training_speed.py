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
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.random_sd35m import save_random_sd35m
from benchmarks.timed_rounds import EVERY_STEP, METHODS, SIZES, SPLIT, SUM, WHOLE, Method, Turns, run
from marble_lightning.command_line import QUIET
from marble_lightning.tinyworld import WEIGHTS


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
        plain = (SUM, k)
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
    titles = [method.title for method in METHODS]
    parser.add_argument("--methods", nargs="+", default=titles, choices=titles, metavar="METHOD", help="rows of the table")
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
                SIZES[options.model],
                path,
                options.device,
                rollout_steps,
            )
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return
        methods = [method for method in METHODS if method.title in {SUM.title, *options.methods}]
        turns = Turns([(method, k) for k in options.rewards for method in methods], options.cycles)
        if options.device == "cpu" or not torch.accelerator.is_available():
            # Peak memory needs a separate process for each turn. These run first, so that a failure loses no timings.
            arguments = ["--model", options.model, "--device", options.device, "--folder", str(path)]
            arguments += ["--rollout-steps", "3"]  # for two times to train on; more need time, not memory
            measured = options.rewards if options.memory is None else options.memory
            for turn in tqdm([turn for turn in turns.turns if turn[1] in measured], desc="Memory"):
                turns.peak[turn] = peak_of_a_process(turn[0], turn[1], arguments)
        try:
            run(turns, SIZES[options.model], path, options.device, rollout_steps)
        finally:  # an interrupted run has measured something, too
            cycles, where = turns.complete(), f"{torch.get_num_threads()} threads, {gpu_name()}"
            if cycles:
                print(f"\n{options.model}, {where}, {cycles} cycles\n\n{table(turns)}")


def gpu_name() -> str:
    """The GPU's name, or "no GPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
