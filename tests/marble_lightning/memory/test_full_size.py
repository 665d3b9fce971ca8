"""Stable Diffusion 3.5 Medium at full size, with random weights, through two rounds of `fit` as its configs say.

On a GPU (`pytest -m gpu -s` with this file): 16 GB of disk, and the memory that each config is for. On a CPU
(`-m "slow and not gpu"`) the same with two blocks, two solver steps and 256 pixels. The reward has no weights, as
those of the 1-GPU run leave.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.random_sd35m import WHOLE, save_random_sd35m, two_rounds
from marble_lightning.command_line import QUIET
from marble_lightning.memory.report import GIB
from tests.helpers.command_line import fit_with, last, state
from tests.helpers.measured_memory import Estimated

CONFIGS = {"sd35m": ["sd35m"], "sd35m_1gpu": ["sd35m", "sd35m_1gpu"]}
LIMITS = {"sd35m": 80, "sd35m_1gpu": 22}
"""GiB that a run may take."""
GPU: dict[str, object] = {"data.images_per_prompt": 24, "model.sampling.times_per_image": 2}
CPU: dict[str, object] = {
    "trainer.accelerator": "cpu", "model.policy.resolution": 256, "data.images_per_prompt": 2, "model.sampling.steps": 2,
    "model.sampling.batch_size": 2, "model.sampling.times_per_image": 1, "model.micro_batch_size": 3,
}  # fmt: skip

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]


class Peaks(Callback):
    """The most bytes that tensors took on the GPU: in training, and in the whole run with what the allocator keeps."""

    training = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.training = max(self.training, torch.cuda.max_memory_allocated())


def options(name: str, path: Path, folder: Path, more: dict[str, object]) -> list[str]:
    more = more | {"model.policy.prompt_cache": folder / "cache", "trainer.logger.name": "tiny"}
    return two_rounds(CONFIGS[name], path, folder, more)


def trained(folder: Path) -> float:
    """How far the adapter has moved."""
    adapters = state(last(folder))["state_dict"]
    return max(tensor.abs().max().item() for name, tensor in adapters.items() if ".lora_B.trained" in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_blocks_train_on_a_cpu(tmp_path, name):
    path = save_random_sd35m(tmp_path / "sd35m", layers=2, t5_layers=1)
    fit_with(options(name, path, tmp_path, CPU))
    assert 0 < trained(tmp_path) < torch.inf


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_rounds_take_what_was_estimated(tmp_path, name, record_property):
    path = save_random_sd35m(tmp_path / "sd35m", **WHOLE)
    peaks, estimated = Peaks(), Estimated()
    torch.cuda.reset_peak_memory_stats()
    fit_with(options(name, path, tmp_path, GPU), estimated, peaks)
    assert 0 < trained(tmp_path) < torch.inf
    most = torch.cuda.max_memory_reserved()
    record_property("training, GiB", f"{peaks.training / GIB:.2f}")
    record_property("estimate of the training, GiB", f"{estimated.estimate.total('training') / GIB:.2f}")
    record_property("reserved at most, GiB", f"{most / GIB:.2f}")
    print(f"{name}: training {peaks.training / GIB:.2f} GiB, reserved at most {most / GIB:.2f} GiB")
    assert most <= LIMITS[name] * GIB
    assert estimated.estimate.total("training") == pytest.approx(peaks.training, rel=0.15)
