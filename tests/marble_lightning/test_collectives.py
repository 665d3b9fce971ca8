"""Tensors sent between ranks are on their devices, since NCCL has no CPU backend, and are few."""

from __future__ import annotations

import json

import pytest
import torch

from marble_lightning.command_line import QUIET
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies import SD3Policy
from tests.helpers import collectives, forks
from tests.helpers.collectives import MarkCPU, mark_of
from tests.helpers.command_line import options
from tests.helpers.small_rewards import Brightness

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


def test_marks_follow_devices():
    device = torch.device("cpu")  # stands for a GPU
    with MarkCPU():
        on_device = torch.zeros(2, device=device)
        assert mark_of(torch.zeros(2)) and mark_of(on_device.cpu()) and mark_of(on_device.cpu().mean() * 2)
        assert not mark_of(on_device.mean()) and not mark_of(torch.zeros(2).to(device).sum())
        assert not mark_of(on_device * torch.tensor(2.0)) and not mark_of(on_device[torch.tensor([1])])


def test_held_out_scores_are_gathered_on_the_device(checkpoints):
    """A metric moves its inputs to its own device, and gathers them there."""
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2)
    module = DiffusionNFT(policy, {"bright": Brightness()}).to("meta")
    assert module.evaluator.scores.device == torch.device("meta")


def on_two_ranks(checkpoints, folder, commands):
    """Run moments and commands one after another; returns the exit statuses, and the output and the counts of rank 0."""
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.accelerator": "cpu", "model.micro_batch_size": 6}
    two |= {"trainer.check_val_every_n_epoch": 1, "trainer.max_epochs": 2}
    run = options(checkpoints, folder, **two)
    runs = [(moment, [command, *run, *more]) for moment, command, *more in commands]
    statuses = forks.call(collectives.run_each, folder, runs)
    outputs = [(folder / f"output_{index}.0").read_text() for index in range(len(runs))]
    of_ranks = [[json.loads((folder / f"run_{n}.{rank}.json").read_text()) for rank in range(2)] for n in range(len(runs))]
    assert all(first == second for first, second in of_ranks)
    return statuses, outputs, [first for first, _ in of_ranks]


PROBES = ["--gradient_alignment.probe_every", "1"]
RESUMES = ["--ckpt_path", "last"]


@pytest.mark.integration
def test_two_ranks_send_no_cpu_tensor_and_few_others(checkpoints, tmp_path):
    """In a run with every callback that is stopped, and in the round of a run that resumes from there."""
    commands = [("SIGTERM in training", "fit", *PROBES), ("never", "fit", *RESUMES)]
    statuses, outputs, counts = on_two_ranks(checkpoints, tmp_path, commands)
    assert statuses == [[0, 0], [0, 0]], "\n\n".join(output[-2500:] for output in outputs)
    assert "Stopped after 1 complete round(s)." in outputs[0]
    phases = counts[1]
    print(json.dumps(phases))
    assert phases["plain step"]["allreduce"] == 2 and phases["refresh"]["allreduce"] == 5
    assert not {"allgather", "gather", "reduce"} & (phases["plain step"].keys() | phases["refresh"].keys())
    assert sum(phases["images of a round"].values()) <= 23  # however many images and batches of sampling


@pytest.mark.slow
def test_evaluations_and_a_failed_run_send_no_cpu_tensor(checkpoints, tmp_path):
    others = [("never", command, *RESUMES) for command in ("validate", "test", "predict")]
    commands = [("never", "fit"), *others, ("a reward fails", "fit", "--model.scoring.retries", "0")]
    statuses, outputs, _ = on_two_ranks(checkpoints, tmp_path, commands)
    assert statuses == [[0, 0]] * 4 + [[1, 1]], "\n\n".join(output[-2500:] for output in outputs)
    assert "the reader is gone" in outputs[-1]
