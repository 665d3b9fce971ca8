"""Two processes train as one process does on the same images."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from marble_lightning.callbacks.image_drift import reference_of
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.results import read
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers import ROOT, forks, stopped, two_processes
from tests.helpers.command_line import differences, last, options, state
from tests.helpers.two_processes import Replay, method, train

pytestmark = pytest.mark.integration

METHODS = ["WeightedSum", "MARBLE", "split"]
SLOWER = ["PCGrad", "CAGrad"]
SHARDED = "{class_path: marble_lightning.ShardedBaseStrategy}"
RUNS = ("ddp", "first", "resumed")
"""Runs of a case of `sharded_runs`, of which the last two are sharded."""


def on_two_ranks(checkpoints: Path, folder: Path, names: list[str]) -> Path:
    """Train with these methods; returns the folder with the results of each rank."""
    failed = forks.call(two_processes.run_each, checkpoints, folder, names)
    assert not failed, failed
    return folder


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory) -> Path:
    return on_two_ranks(checkpoints, tmp_path_factory.mktemp("ranks"), [*METHODS, "sharded"])


@pytest.fixture(scope="module")
def trained_slower(checkpoints, tmp_path_factory) -> Path:
    return on_two_ranks(checkpoints, tmp_path_factory.mktemp("ranks"), SLOWER)


@pytest.mark.filterwarnings(*(f"ignore:{known}" for known in QUIET))
@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)])
def test_two_ranks_equal_one_process(checkpoints, tmp_path, request, name):
    """After five optimizer steps on the same images, across refreshes, reuse, clamps and missing rewards."""
    folder = request.getfixturevalue("trained" if name in METHODS else "trained_slower")
    ranks = [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(2)]

    module, *_ = train(Replay, checkpoints, method(name), [rank["rounds"] for rank in ranks], default_root_dir=tmp_path)
    fresh = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, text_length=4, dtype="float32")
    fresh.setup(seed=0)
    start, single = flat(fresh.parameters_of("trained")), flat(module.trainable)
    first, second = (flat(rank["parameters"]) for rank in ranks)
    assert torch.equal(first, second)
    change = (single - start).norm()
    assert change > 1e-3 * start.norm(), "the change is too small for the comparison"
    assert (single - first).norm() <= 1e-5 * change  # relative to the change, which is smaller than the parameters
    adapters = 3 * sum(parameter.nbytes for parameter in module.trainable)
    assert ranks[0]["broadcasts"] == ranks[1]["broadcasts"] == [adapters]  # once at the start, and no frozen weights
    statistics = [rank["statistics"][0] for rank in ranks]
    assert not torch.equal(*statistics)
    assert ranks[0]["reference"] == ranks[1]["reference"] == reference_of(torch.cat(statistics))


def flat(parameters):
    """Concatenate parameters to one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def test_a_sharded_base_trains_bit_for_bit_like_a_whole_one(trained):
    """Gradients, inner products and weights of a refresh, adapters, held-out scores; from the first round and resumed."""
    check_sharded(trained / "sharded")
    parts = json.loads((trained / "sharded/first/rank_0.json").read_text())["parts"]
    sizes, buffer = json.loads((trained / "sharded/first/rank_0.json").read_text())["sizes"], 8 * 8 * 16
    assert parts["transformer"] == 2 * (sizes[1] + buffer)  # two bytes of each number


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backward"), [("sharded_checkpointing", 3), ("sharded_per_reward", 7)])
def test_a_sharded_base_with_other_backward_passes(checkpoints, tmp_path, name, backward):
    check_sharded(on_two_ranks(checkpoints, tmp_path, [name]) / name, backward)


@pytest.mark.slow
def test_a_sharded_base_of_another_model(z_image, tmp_path):
    check_sharded(on_two_ranks(z_image.parent, tmp_path, ["sharded_z_image"]) / "sharded_z_image", units=5)


def check_sharded(folder: Path, backward: int = 3, units: int = 3) -> None:
    """Compare the runs of a case of `sharded_runs`, and count what the sharded ones gather.

    Args:
        folder: Folder of the case.
        backward: Backward passes of a refresh.
        units: What is gathered at once: each block, and the rest of the transformer.
    """
    for whole, sharded in (("ddp/round_0000", "first/last"), ("ddp/last", "resumed/last")):
        expected = state(folder / f"{whole}.ckpt")
        assert max(value.abs().max() for name, value in expected["state_dict"].items() if "lora_B.trained" in name) > 0
        assert expected["callbacks"]["MARBLE"]["signal"]["own"]["mean"].diagonal().min() > 0  # inner products
        assert expected["trained_scores"]["scores"].shape == expected["base_scores"].shape == (6, 3)
        assert differences(expected, state(folder / f"{sharded}.ckpt")) == []
    found = {run: [json.loads((folder / f"{run}/rank_{rank}.json").read_text()) for rank in range(2)] for run in RUNS}
    scores = state(folder / "first/last.ckpt")["trained_scores"]["scores"]
    torch.testing.assert_close(torch.tensor(found["first"][0]["again"]), scores, rtol=0, atol=0, equal_nan=True)
    passes = {"held-out": 2, "sampling": 2, "refresh": 3 + backward, "plain step": 3 + 1 + 1}  # 1: check of the old adapter
    first = {phase: number * units for phase, number in (passes | {"held-out": 2 * 2}).items()}  # the base's scores too
    resumed = {phase: number * units for phase, number in passes.items()}
    for run, gathered in zip(RUNS, ({}, first, resumed), strict=True):
        assert [rank["gathered"] for rank in found[run]] == [gathered, gathered], run
        (numbers, *held) = found[run][0]["sizes"][0], *(rank["sizes"][1] for rank in found[run])
        assert held == pytest.approx([numbers] * 2 if run == "ddp" else [numbers / 2] * 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("balancer", "strategy"), [("MARBLE", "ddp"), ("WeightedSum", "ddp"), ("MARBLE", SHARDED)])
def test_two_processes_train_from_the_command_line(small, tmp_path, balancer, strategy):
    """Over gloo: the run ends with a table, and its adapters have changed."""
    options = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--balancer", balancer]
    options += ["--model.micro_batch_size", "6", "--gradient_alignment.probe_every", "1"]
    options += [
        "--data.held_out_per_source",
        "1",
        "--data.held_out_batch_size",
        "2" if strategy == SHARDED else "1",
    ]  # 1: two batches on one rank, one on the other
    command = [sys.executable, "-m", "marble_lightning", "fit", *small, *options]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "This run:" in ended.stdout
    assert [prompt["index"] for prompt in read(tmp_path / "tiny/version_0")["prompts"]] == [0, 1, 2]
    saved = torch.load(tmp_path / "tiny/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert max(tensor.abs().max() for name, tensor in saved.items() if ".lora_B.trained" in name) > 0


def ranks(
    arguments: list[str], output: Path, slurm: dict[str, str] | None = None, moments: list[str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start the command line as two ranks like a cluster does; like SLURM if `slurm` has its variables.

    With `moments` process rank runs in a child process that is stopped then, and prints the exit status of the child.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if slurm:
            variables = {"PROCID": str(rank), "LOCALID": str(rank), "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2"} | {
                "JOB_NAME": "fit"
            }
            environment |= {f"SLURM_{name}": value for name, value in (slurm | variables).items()}
            path = f"{ROOT / 'tests/helpers/slurm'}{os.pathsep}{os.environ['PATH']}"
            environment |= {"OUTPUT_FILE": str(output), "PATH": path}
        with output.with_suffix(f".{rank}").open("w") as file:
            command = [sys.executable, "-m", "marble_lightning", "fit", *arguments]
            if moments:
                child = [moments[rank], ["fit", *arguments], str(output.with_suffix(f".child_{rank}"))]
                command = [sys.executable, stopped.__file__, json.dumps([child])]
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file))
    return started


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_two_stopped_ranks_resume_bit_for_bit(checkpoints, tmp_path, end):
    """The signal arrives at any moment after the first round."""
    folders, output = [tmp_path / "complete", tmp_path / "ended"], tmp_path / "output"
    more = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 6, "trainer.check_val_every_n_epoch": 6}
    complete, ended = (options(checkpoints, folder, **more) for folder in folders)
    assert [process.wait(100) for process in ranks(complete, output)] == [0, 0], output.with_suffix(".0").read_text()[-3000:]

    job = {"JOB_ID": "7"} if end == signal.SIGUSR1 else {}
    started = ranks(ended, output, job)
    try:
        while not last(folders[1]).exists():
            assert all(process.poll() is None for process in started), output.with_suffix(".0").read_text()[-3000:]
            time.sleep(0.05)
        for process in started[: 1 if end == signal.SIGTERM else 2]:  # after SIGTERM to one rank, all stop
            process.send_signal(end)
        statuses = [process.wait(60) for process in started]
    finally:
        for process in started:
            process.kill()
    # a clean stop: only the first rank, which writes the checkpoint, returns the status of the signal
    assert statuses == ([-9, -9] if end == signal.SIGKILL else [128 + end, 0]), output.with_suffix(".0").read_text()[-3000:]
    assert state(last(folders[1]))["epoch"] < 5, "the signal came too late"
    if job:
        assert output.read_text() == "scontrol requeue 7\n"
    again = ranks(ended if job else [*ended, "--ckpt_path", "last"], output, job and job | {"RESTART_COUNT": "1"})
    assert [process.wait(100) for process in again] == [0, 0], output.with_suffix(".0").read_text()[-3000:]
    assert differences(state(last(folders[0])), state(last(folders[1], 1))) == []


@pytest.mark.slow
def test_a_signal_to_one_of_two_evaluating_ranks_ends_both(checkpoints, tmp_path):
    """One rank has one more batch of held-out prompts than the other."""
    more = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 2}
    more |= {"data.held_out_per_source": 3, "data.held_out_batch_size": 2}
    output = tmp_path / "output"
    moments = ["never", "SIGTERM in validation"]
    assert [process.wait(100) for process in ranks(options(checkpoints, tmp_path, **more), output, moments=moments)] == [
        0,
        0,
    ]
    assert [output.with_suffix(f".{rank}").read_text().splitlines()[-1] for rank in range(2)] == ["[143]", "[0]"]
    assert (
        state(last(tmp_path))["epoch"] == 0
        and "Stopped after 1 complete round(s)" in output.with_suffix(".child_0").read_text()
    )
