"""Steps of `benchmarks.gpu_check` that need no model: the machine, tests, and memory that stays after first calls."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import threading
import xml.etree.ElementTree as xml
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_check import Run
from benchmarks.phases import now

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "peft", "transformers", "diffusers", "qpth", "jsonargparse")
FULL_SIZE = "tests/marble_lightning/memory/test_full_size.py"


def machine(run: Run) -> None:
    """Card, driver, versions and the commit."""
    record = run.record
    record["card"] = torch.cuda.get_device_name() if run.device == "cuda" else "no GPU"
    if run.device == "cuda":
        record["memory of the card, GiB"] = torch.cuda.mem_get_info()[1] / 2**30
        record["CUDA of torch"] = str(torch.version.cuda)
        record["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    record["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            record[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            record[package] = "not installed as a package"
    record["commit"] = output_of("git", "rev-parse", "HEAD")


def output_of(*command: str) -> str:
    """The output of a command, or why there is none."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown, {error}"


# Tests ------------------------------------------------------------------------------------------------------------------


def gpu_tests(run: Run) -> None:
    """The tests marked `gpu` but those at full size; without a GPU the others of one short file."""
    if run.device == "cpu":
        pytest(run, "tests/marble_lightning/utils/test_peak_memory.py", "not gpu")
        return
    for file in sorted(ROOT.glob("tests/**/test_*.py")):
        name = str(file.relative_to(ROOT))
        if "pytest.mark.gpu" in file.read_text() and name != FULL_SIZE:
            pytest(run, name, "gpu")


def full_size(run: Run, config: str) -> None:
    """Two rounds of a configuration at full size, in its test."""
    pytest(run, f"{FULL_SIZE}::test_two_rounds_take_what_was_estimated[{config}]", "gpu")


def pytest(run: Run, tests: str, mark: str) -> None:
    """Run tests of a file in a process of their own; record how many passed, their properties, and messages of the others.

    Raises:
        RuntimeError: pytest did not run them.
    """
    report = run.folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", "-p", "no:cacheprovider", "-m", mark]
    ended = subprocess.run([*command, f"--junitxml={report}", tests], cwd=ROOT, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest must run {tests}. Found exit status {ended.returncode}; its output is in the log.")
    cases, passed = list(xml.parse(report).iter("testcase")), 0
    for case in cases:
        name = f"{Path(tests.partition('::')[0]).stem}::{case.get('name')}"
        problems = [node for node in case if node.tag in ("failure", "error", "skipped")]
        passed += not problems
        for node in problems:
            run.record[name] = f"{node.tag}: {' '.join(node.get('message', '').split())[:300]}"
        for property in case.iter("property"):
            run.record[f"{name}, {property.get('name')}"] = property.get("value", "")
    run.record[f"{Path(tests.partition('::')[0]).stem}, passed of {len(cases)}"] = passed


# Memory of first calls --------------------------------------------------------------------------------------------------


def workspaces(run: Run) -> None:
    """Bytes that stay allocated after the first call of each kind, when its result is freed."""
    cuda, record = run.device == "cuda", run.record
    whole = torch.ones(64, 64, device=run.device)
    half, pixels = whole.bfloat16(), torch.ones(1, 4, 8, 8, device=run.device, dtype=torch.bfloat16)
    kernel, parameter = torch.ones(4, 4, 3, 3, device=run.device, dtype=torch.bfloat16), whole.clone().requires_grad_()
    tokens = half[None, None]
    second, third = (torch.cuda.Stream() if cuda else None for _ in range(2))
    calls: dict[str, tuple[Callable[[], object], Any]] = {
        "float32 matmul": (lambda: whole @ whole, None),
        "the same again": (lambda: whole @ whole, None),
        "bfloat16 matmul": (lambda: half @ half, None),
        "bfloat16 linear with bias": (lambda: F.linear(half, half, half[0]), None),
        "float32 matmul and its backward pass": (lambda: torch.autograd.grad((parameter @ whole).sum(), parameter), None),
        "float32 matmul, second stream": (lambda: whole @ whole, second),
        "bfloat16 matmul, second stream": (lambda: half @ half, second),
        "bfloat16 matmul, third stream": (lambda: half @ half, third),
        "bfloat16 convolution": (lambda: F.conv2d(pixels, kernel), None),
        "bfloat16 attention": (lambda: F.scaled_dot_product_attention(tokens, tokens, tokens), None),
    }
    calls["float32 matmul in another thread"] = (lambda: in_thread(lambda: whole @ whole), None)
    first = allocated(run)
    for name, (call, stream) in calls.items():
        before = allocated(run)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            call()
        record[f"{name}, bytes"] = allocated(run) - before if cuda else "not counted on a CPU"
    record["all, bytes"] = allocated(run) - first if cuda else "not counted on a CPU"


def in_thread(call: Callable[[], object]) -> None:
    """Call a function in a thread of its own, as a reward is called; it has its own workspaces."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def allocated(run: Run) -> int:
    """Bytes of torch's tensors and workspaces on a CUDA device, after synchronising it; 0 on a CPU."""
    now()
    return torch.cuda.memory_allocated() if run.device == "cuda" else 0
