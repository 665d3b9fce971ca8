"""Checks of the weights that several processes have loaded."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from torch import nn

from marble_lightning import checks


def test_processes_must_load_the_same_weights(monkeypatch):
    policy, reward = nn.Linear(2, 2), nn.Linear(2, 2)
    policy.text_encoders = {"text_encoder": nn.Linear(2, 2)}
    changed = copy.deepcopy(reward)
    changed.weight.data[1, 1] += 1
    gathered = []
    monkeypatch.setattr(checks, "gather_items", lambda items: gathered.extend(items) or gathered)
    for _ in range(2):
        checks.check_same_weights(SimpleNamespace(world_size=2), policy, {"one": reward})
    with pytest.raises(checks.DifferentWeights, match=r"Found different ones of rewards\.one; give every"):
        checks.check_same_weights(SimpleNamespace(world_size=2), policy, {"one": changed})


def test_one_process_compares_nothing():
    checks.check_same_weights(SimpleNamespace(world_size=1), None, None)
