"""The optimizer of the base model against torch's, and its state."""

from __future__ import annotations

import copy

import torch
from torch import nn

from marble_lightning.tinyworld.recipe.muon import Muon, orthogonalised


def steps(optimizers, layer, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_a_step_is_that_of_torch():
    """Within the rounding of bfloat16, in which torch's Muon computes; the bias is AdamW's."""
    torch.manual_seed(0)
    ours = nn.Linear(24, 48)
    theirs = copy.deepcopy(ours)
    steps([Muon([ours.weight], [ours.bias], lr=1e-2, matrix_lr=0.1)], ours, 3)
    adamw = torch.optim.AdamW([theirs.bias], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    steps([torch.optim.Muon([theirs.weight], lr=0.1, weight_decay=0.01), adamw], theirs, 3)
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-2, rtol=0)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_singular_values_become_about_one():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_state_survives_saving():
    torch.manual_seed(0)
    one = nn.Linear(8, 8)
    optimizer = Muon([one.weight], [one.bias], lr=1e-2, matrix_lr=0.1)
    steps([optimizer], one, 2)
    other = copy.deepcopy(one)
    resumed = Muon([other.weight], [other.bias], lr=1.0, matrix_lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for layer, kept in ((one, optimizer), (other, resumed)):
        steps([kept], layer, 2)
    torch.testing.assert_close(other.weight, one.weight, atol=0, rtol=0)
    torch.testing.assert_close(other.bias, one.bias, atol=0, rtol=0)
