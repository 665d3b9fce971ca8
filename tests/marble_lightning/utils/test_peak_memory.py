"""The peak memory of a process does not fall, and counts what was freed."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.utils.peak_memory import peak_memory


def test_freed_memory_of_the_process_counts():
    before = peak_memory(torch.device("cpu"))
    assert before["of"] == "process"
    size = int((before["gib"] + 0.25) * 2**30)
    torch.zeros(size, dtype=torch.uint8).add_(1)
    after = peak_memory(torch.device("cpu"))["gib"]
    most = before["gib"] + size / 2**30  # if the process was at its peak already
    assert size / 2**30 <= after < most + 0.01  # and pages of the allocator


@pytest.mark.gpu
def test_freed_memory_of_a_gpu_counts():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    peak = peak_memory(torch.device("cuda"))
    assert peak["of"] == "GPU" and peak["gib"] == pytest.approx((before + 2**28) / 2**30)
