"""The check of a GPU: what it records of steps that end, fail, are stopped or do not start; and its steps on a CPU."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import STEPS, Step, check, escape, readable, table
from tests.helpers import ROOT, forks


def good(run, number=1.0):
    run.record["number"] = number


def bad(run):
    run.record["before"] = 1
    raise ValueError("no card | here")


def dies(run):
    os._exit(3)


def slow(run):
    run.record["before"] = 2
    time.sleep(600)


@pytest.fixture(name="step")
def _step(monkeypatch):
    """A function that makes a step of one of the functions above."""
    monkeypatch.setitem(sys.modules, "steps_of_a_test", SimpleNamespace(good=good, bad=bad, dies=dies, slow=slow))

    def make(function, least=0, limit=60, **options):
        return Step(function, f"the step {function}", least, limit, "steps_of_a_test", function, options)

    return make


def test_every_step_is_recorded_and_the_next_one_runs(step, tmp_path):
    steps = [step("bad"), step("dies"), step("slow", limit=5), step("good", least=3600), step("good", number=0.123456)]
    report = check(steps, "cpu", True, tmp_path, minutes=9)
    assert [record["state"] for record in report["steps"]] == ["failed", "failed", "stopped", "no time left", "done"]
    assert [record["values"] for record in report["steps"]] == [
        {"before": 1}, {}, {"before": 2}, {}, {"number": 0.123456},
    ]  # fmt: skip
    errors = [record["error"] for record in report["steps"]]
    assert errors[:3] == ["ValueError: no card | here", "exit status 3; see log.txt", "it was stopped after 5 s"]
    assert errors[3].startswith("it needs 3600 s, and ")
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == report
    written = (tmp_path / "gpu_check.md").read_text()
    assert written == table(report)
    assert r"**failed**: ValueError: no card \| here |" in written
    assert "| | number | 0.1235 |" in written
    assert "ValueError: no card | here" in (tmp_path / "log.txt").read_text()


def test_files_are_written_after_each_step(step, tmp_path, monkeypatch):
    written, write = [], gpu_check.write
    monkeypatch.setattr(gpu_check, "write", lambda *arguments: (write(*arguments), written.append(read(tmp_path))))
    check([step("good"), step("good", number=2.0)], "cpu", True, tmp_path, minutes=9)
    assert [[record["values"]["number"] for record in report["steps"]] for report in written] == [[1.0], [1.0, 2.0]]


def test_values_in_the_table():
    assert (readable(12345.678), readable(False), escape("a|b")) == ("1.235e+04", "NO", r"a\|b")


def printed(arguments):
    """What the command prints; it runs in this process."""
    sys.argv = ["gpu_check", *arguments]
    with redirect_stdout(io.StringIO()) as shown:
        gpu_check.main()
    return shown.getvalue()


@pytest.mark.integration
def test_the_command_runs_the_named_steps(tmp_path):
    """In processes of their own, which need seconds here; the slow test below runs all, and starts an interpreter."""
    arguments = ["--device", "cpu", "--small", "--steps", "machine", "workspaces", "--output", str(tmp_path)]
    shown = forks.call(printed, arguments)  # an exit with any status fails it
    steps = {record["name"]: record for record in read(tmp_path)["steps"]}
    assert {name: record["state"] for name, record in steps.items()} == {"machine": "done", "workspaces": "done"}, shown
    assert steps["machine"]["values"]["card"] == "no GPU"
    assert steps["workspaces"]["values"]["float32 matmul in another thread, bytes"] == "not counted on a CPU"
    assert (tmp_path / "gpu_check.md").read_text() in shown


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_small_steps_run_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small", "--minutes", "50"]
    ended = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    steps = {record["name"]: record for record in read(tmp_path)["steps"]}
    assert {name: record["error"] for name, record in steps.items() if record["state"] != "done"} == {}, ended
    assert list(steps) == [step.name for step in STEPS if step.small]
    values = {name: record["values"] for name, record in steps.items()}
    assert values["gpu_tests"] == {"test_peak_memory, passed of 1": 1}
    assert values["sampling"]["sampling, 2 steps, images a second"] > 0
    assert values["micro_batches"]["refresh by K passes, relative speed (paper: 0.56 (K = 5))"] > 0
    assert values["micro_batches"]["plain, estimated memory of training, MiB"] > 0
    assert values["resume"]["killed and resumed is equal bit for bit"] is True
    assert values["scoring"].keys() >= {f"{name}, images a second" for name in ("pickscore", "geneval", "imagereward")}
    assert (tmp_path / "gpu_check.md").read_text() in ended.stdout


def read(folder):
    return json.loads((folder / "gpu_check.json").read_text())
