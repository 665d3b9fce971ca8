"""What a GPU can tell within ten minutes, most important first: `python -m benchmarks.gpu_check`.

The steps run one after the other, each in a process of its own: the tests marked `gpu`; memory that cuBLAS keeps; Stable
Diffusion 3.5 Medium at full size with random weights, which samples, trains on micro-batches of each kind and is compared
with the paper's speeds; two rounds of `fit`, killed and resumed; the rewards of configs/sd35m.yaml at full size with random
weights. A step that fails, or for which no time is left, is recorded as such. `gpu_check.json` and `gpu_check.md` in
`--output` are written after every step, and also hold what a stopped step has measured until then.

Run it in the repository's folder. `--device cpu --small` runs the same code with small sizes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from marble_lightning.utils.atomic_files import atomic_write

MINUTES = 9
"""Minutes for all steps, for which their limits are made."""
GRACE = 10
"""Seconds that a stopped step has to end its own child processes."""


class Record:
    """What a step measures, by name. A file has all values as soon as they are there.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.values = file, dict[str, Any]()

    def __setitem__(self, name: str, value: float | str) -> None:
        self.values[name] = value
        with atomic_write(self.file) as scratch:
            scratch.write_text(json.dumps(self.values))


@dataclass(frozen=True)
class Run:
    """What a step needs.

    Args:
        device: `cuda` or `cpu`.
        small: Whether the bundled tiny model stands for SD3.5-M, and networks of little width for the rewards.
        folder: Folder for what steps write and share.
        record: What it measures.
    """

    device: str
    small: bool
    folder: Path
    record: Record


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Args:
        name: Name of the step.
        title: The step in the table.
        least: Seconds that must be left to start it.
        limit: Seconds after which it is stopped; more in proportion if there are more than `MINUTES`.
        module: Module of `function`, which is imported in the step's process only.
        function: Runs the step; it takes the `Run` and the options.
        options: Its options.
        small: Whether `--small` has it too.
    """

    name: str
    title: str
    least: float
    limit: float
    module: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    small: bool = True


MACHINE, MODEL = "benchmarks.gpu_steps", "benchmarks.gpu_model_steps"
FULL = ("sd35m", "sd35m_1gpu")
COMPILED: dict[str, Any] = {"options": {"compile": True}, "small": False}
STEPS = (
    Step("machine", "card and versions", 5, 60, MACHINE, "machine"),
    Step("gpu_tests", "tests marked `gpu`, without those at full size", 20, 120, MACHINE, "gpu_tests"),
    Step("workspaces", "bytes that stay allocated after the first call", 10, 60, MACHINE, "workspaces"),
    Step("checkpoint", "SD3.5-M with random weights", 20, 120, MODEL, "checkpoint", small=False),
    Step("sampling", "sampling, eager", 25, 90, MODEL, "sampling"),
    Step("micro_batches", "micro-batches, eager, K = 5", 40, 150, MODEL, "micro_batches"),
    Step("speeds", "ten optimizer steps, eager, K = 5", 60, 180, MODEL, "speeds"),
    Step("compiled_sampling", "sampling, compiled", 45, 120, MODEL, "sampling", **COMPILED),
    Step("compiled_micro_batches", "micro-batches, compiled, K = 5", 60, 180, MODEL, "micro_batches", **COMPILED),
    Step("resume", "`fit`, killed and resumed", 40, 150, MODEL, "resume"),
    Step("scoring", "a batch of each reward", 30, 120, MODEL, "scoring"),
    *(
        Step(name, f"test at full size, {name}", 90, 400, MACHINE, "full_size", {"config": name}, small=False)
        for name in FULL
    ),
)
"""In the order in which they run, most important first."""


def run_step(step: Step, run: Run, log: Path) -> None:
    """Run a step in this process, with its output in a file.

    Args:
        step: The step.
        run: What it needs.
        log: File for its output; its exception goes to `error.txt` in the folder of the run.
    """
    os.setsid()  # its children are killed with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # a caller may have replaced them
    print(f"--- {step.name}", flush=True)
    try:
        getattr(import_module(step.module), step.function)(run, **step.options)
    except BaseException as error:
        (run.folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def attempt(step: Step, run: Run, log: Path, deadline: float) -> dict[str, Any]:
    """Run a step in a new process.

    Args:
        step: The step.
        run: What it needs.
        log: File for its output.
        deadline: Time of `time.monotonic` at which it is stopped at the latest.

    Returns:
        Its record: `state` is done, failed, stopped or no time left, and `error` says why; `seconds`; `values` by name.
    """
    record: dict[str, Any] = {"name": step.name, "title": step.title, "seconds": 0.0, "values": {}, "error": ""}
    start = time.monotonic()
    if (left := deadline - start) < step.least:
        return record | {"state": "no time left", "error": f"it needs {step.least:.0f} s, and {max(left, 0):.0f} s are left"}
    values, failure = run.record.file, run.folder / "error.txt"
    for file in (values, failure):
        file.unlink(missing_ok=True)
    # a fork saves the time of imports; CUDA needs a new process
    context: Any = multiprocessing.get_context("fork" if run.device == "cpu" else "spawn")
    process = context.Process(target=run_step, args=(step, run, log))
    process.start()
    process.join(min(step.limit, left))
    stopped = process.is_alive()
    if stopped:
        stop(process)
    record["seconds"] = round(time.monotonic() - start, 1)
    record["state"] = "stopped" if stopped else "failed" if process.exitcode else "done"
    if stopped:
        record["error"] = f"it was stopped after {min(step.limit, left):.0f} s"
    elif process.exitcode:
        record["error"] = failure.read_text() if failure.exists() else f"exit status {process.exitcode}; see {log.name}"
    if values.exists():
        record["values"] = json.loads(values.read_text())
    return record


def stop(process: Any) -> None:
    """End a step's process and its children."""
    process.terminate()
    process.join(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def table(report: dict[str, Any]) -> str:
    """The report as one table in Markdown, below the date; card and versions are in its first rows."""
    sizes = "small sizes" if report["small"] else "full size"
    lines = [f"{report['date']}, {report['device']}, {sizes}", "", "| step | measured | result |", "|---|---|---|"]
    for record in report["steps"]:
        error = f": {' '.join(record['error'].split())[:300]}" if record["error"] else ""
        lines.append(f"| {record['title']} | {record['seconds']:.0f} s | **{record['state']}**{escape(error)} |")
        lines += [f"| | {escape(name)} | {escape(readable(value))} |" for name, value in record["values"].items()]
    return "\n".join(lines) + "\n"


def readable(value: Any) -> str:
    """A value for the table; numbers have four digits.

    >>> readable(0.123456), readable(33554432), readable(True), readable("H200")
    ('0.1235', '33554432', 'yes', 'H200')
    """
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def escape(text: str) -> str:
    """A text that may stand in a cell."""
    return text.replace("|", "\\|")


def write(report: dict[str, Any], output: Path) -> None:
    """Write the report as JSON and as a table."""
    for name, text in (("gpu_check.json", json.dumps(report, indent=1)), ("gpu_check.md", table(report))):
        with atomic_write(output / name) as scratch:
            scratch.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")


def check(steps: Sequence[Step], device: str, small: bool, output: Path, minutes: float) -> dict[str, Any]:
    """Run the steps, and write the report after each.

    Args:
        steps: The steps, in their order.
        device: `cuda` or `cpu`.
        small: Whether sizes are small.
        output: Folder of the report.
        minutes: Time for all steps.
    """
    deadline, log = time.monotonic() + 60 * minutes, output / "log.txt"
    output.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": date, "device": device, "small": small, "minutes": minutes, "steps": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = Run(device, small, Path(folder), Record(Path(folder) / "values.json"))
        for step in steps:
            step = replace(step, limit=step.limit * max(1, minutes / MINUTES))
            report["steps"].append(record := attempt(step, run, log, deadline))
            write(report, output)
            print(f"{record['title']}: {record['state']}, {record['seconds']:.0f} s. {record['error'][:300]}", flush=True)
    return report


def main() -> None:
    """Run the check and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all steps")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, without the steps that need a GPU's speed")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="folder of results and log")
    chosen = parser.parse_args()
    steps = [step for step in STEPS if (step.small or not chosen.small) and step.name in (chosen.steps or [step.name])]
    if chosen.device == "cpu":
        import_module(MODEL)  # each step forks from this process
    report = check(steps, chosen.device, chosen.small, chosen.output, chosen.minutes)
    print(f"\n{table(report)}")


if __name__ == "__main__":
    main()
