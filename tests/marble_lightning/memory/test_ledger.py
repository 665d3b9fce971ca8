"""What is counted of fake tensors, and that they behave as a GPU's tensors would."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.memory.ledger import Fakes


def test_the_ledger_follows_storages():
    fakes = Fakes(block=512)
    with fakes.mode:
        given = torch.empty(1000)
    with fakes.counting(given) as ledger:
        kept = torch.empty(100)  # 400 bytes, a block of 512
        views = [kept[:50], given[1:]]
        assert (ledger.live, ledger.peak) == (512, 512)
        for _ in range(3):
            views.clear()
            views += [kept * 2, given.view(10, 100)]
        assert (ledger.live, ledger.peak) == (1024, 1024)
        del kept
        views.clear()
        assert (ledger.live, ledger.peak) == (0, 1024)


@pytest.mark.parametrize(("lanes", "copies"), [(0, 0), (8, 1), (16, 2)])
def test_a_cpus_convolution_has_its_result_twice(lanes, copies):
    fakes = Fakes()
    fakes.lanes = lanes
    network = fakes.copy(torch.nn.Conv2d(4, 8, 3, padding=1))
    with fakes.mode:
        given = torch.empty(2, 4, 6, 6)
    with fakes.counting(given) as ledger, torch.no_grad():
        result = network(given)
    assert ledger.live == result.nbytes == 4 * 2 * 8 * 6 * 6
    assert ledger.peak == (1 + copies) * result.nbytes  # eight channels fill half a block of sixteen


def test_a_gpus_convolution_is_counted_once():
    assert Fakes(cuda=True).lanes == 0


def test_attention_keeps_no_weights_of_every_pair():
    fakes, length = Fakes(), 4096
    with fakes.counting() as ledger:
        query, key, value = (torch.empty(1, 2, length, 8, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert ledger.peak < length**2


@pytest.mark.parametrize(("cuda", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_gpus_autocast_normalises_in_float32_also_on_the_way_back(cuda, expected):
    fakes = Fakes(cuda=cuda)
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8, elementwise_affine=False))
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, inputs):
            seen.append(self.network(inputs).dtype)
            return self.network(inputs)

    watched = fakes.copy(Watched())
    with fakes.counting():
        with torch.autocast("cpu", torch.bfloat16):
            output = fakes.checkpoint(watched, torch.empty(4, 8))
        torch.autograd.grad(output.sum(), list(watched.parameters()))
    assert seen == [expected, expected]


def test_a_part_may_keep_its_precision():
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2).requires_grad_(False) for _ in range(2)])
    copied = Fakes().copy(module, dtype=torch.bfloat16, fixed=[module[0]])
    assert [layer.weight.dtype for layer in copied] == [torch.float32, torch.bfloat16]
