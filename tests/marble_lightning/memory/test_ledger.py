"""The bytes of live fake tensors, the operations on them, and autocast as on a GPU."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.memory.ledger import Fakes


def test_the_ledger_follows_storages():
    fakes = Fakes()
    with fakes.mode:
        given = torch.empty(1000)
    with fakes.counting(given) as ledger:
        kept = torch.empty(100)
        views = [kept[:50], given[1:]]
        assert (ledger.live, ledger.peak) == (400, 400)
        for _ in range(3):
            views.clear()
            views += [kept * 2, given.view(10, 100)]
        assert (ledger.live, ledger.peak) == (800, 800)
        del kept
        views.clear()
        assert (ledger.live, ledger.peak) == (0, 800)


def test_attention_keeps_no_weights_of_every_pair():
    fakes, length = Fakes(), 4096
    with fakes.counting() as ledger:
        query, key, value = (torch.empty(1, 2, length, 8, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert ledger.peak < length**2


def test_operations_of_products_attention_and_convolutions():
    fakes = Fakes()
    with fakes.counting() as ledger:
        inputs, weight = torch.empty(3, 4, requires_grad=True), torch.empty(5, 4, requires_grad=True)
        product = torch.nn.functional.linear(inputs, weight)
        assert ledger.flops == 2 * 3 * 4 * 5
        product.sum().backward()
    assert ledger.flops == 3 * 2 * 3 * 4 * 5
    with fakes.counting() as ledger:
        query, key, value = (torch.empty(2, 3, 16, 8, requires_grad=True) for _ in range(3))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert ledger.flops == 2 * (2 * 2 * 3 * 16 * 16 * 8)
        attended.sum().backward()
    assert ledger.flops == (2 + 5) * (2 * 2 * 3 * 16 * 16 * 8)  # the kernel computes queries times keys again
    with fakes.counting() as ledger, torch.no_grad():
        torch.nn.functional.conv2d(torch.empty(1, 3, 8, 8), torch.empty(6, 3, 3, 3), padding=1)
    assert ledger.flops == 2 * 8 * 8 * 6 * 3 * 3 * 3


@pytest.mark.parametrize(("cuda", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_gpus_autocast_normalises_in_float32_in_the_backward_pass_too(cuda, expected):
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
