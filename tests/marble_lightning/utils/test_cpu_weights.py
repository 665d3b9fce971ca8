"""Weights that stay on the CPU while their modules are elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from marble_lightning.utils.cpu_weights import CPUWeights


def test_frozen_weights_return_without_a_copy():
    """From `meta` nothing could be copied back. A part that two modules share stays shared."""
    shared = nn.Linear(2, 2)
    one, other = (nn.Sequential(nn.Linear(2, 2), shared).requires_grad_(False) for _ in range(2))
    before = [tensor.data_ptr() for module in (one, other) for tensor in module.parameters()]
    weights = CPUWeights([one, other])
    for module in (one, other):
        module.to("meta")
    assert {tensor.device.type for tensor in one.parameters()} == {"meta"}
    weights.restore()
    assert [tensor.data_ptr() for module in (one, other) for tensor in module.parameters()] == before
    assert one[1].weight is other[1].weight


def test_what_may_change_is_left_to_copies():
    """Buffers and parameters that are not frozen; here the CPU stands for the other device, with copies of all tensors."""
    module = nn.BatchNorm1d(2)
    module.bias.requires_grad_(False)
    weights = CPUWeights([module])
    for tensor in (module.weight, module.bias, module.running_mean):
        tensor.data = tensor.data + 1
    weights.restore()
    assert [tensor[0].item() for tensor in (module.weight, module.bias, module.running_mean)] == [2, 0, 1]


def test_a_second_return_changes_nothing():
    module = nn.Linear(2, 2).requires_grad_(False)
    weights = CPUWeights([module])
    weights.restore()
    module.weight.data = torch.ones(2, 2)
    weights.restore()
    assert (module.weight == 1).all()
