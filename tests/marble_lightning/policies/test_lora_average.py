"""Averages of LoRAs, beside the mean of the dense updates."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.policies.lora import Lora
from marble_lightning.policies.lora_average import average, truncate

SIZES = {"blocks.0.to_q": (12, 10), "blocks.0.to_v": (9, 12)}


def lora(seed, rank=4, alpha=8.0, sizes=None):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, inner) in (sizes or SIZES).items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, inner, generator=draw)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, generator=draw)
    return Lora(tensors, rank, alpha, f"file {seed}")


def update(lora, layer):
    """The dense update of a layer."""
    return lora.alpha / lora.rank * lora.tensors[f"{layer}.lora_B.weight"] @ lora.tensors[f"{layer}.lora_A.weight"]


def test_the_average_is_the_mean_of_the_updates():
    loras = [lora(0), lora(1, rank=2, alpha=1.0), lora(2, rank=3, alpha=9.0)]
    mean = average(loras)
    assert mean.rank == 9
    assert mean.alpha / mean.rank == 2.0
    for layer in SIZES:
        expected = torch.stack([update(single, layer) for single in loras]).mean(0)
        torch.testing.assert_close(update(mean, layer), expected)


def test_the_average_of_one_is_itself():
    single = lora(0)
    assert average([single]).tensors.keys() == single.tensors.keys()
    torch.testing.assert_close(dict(average([single]).tensors), dict(single.tensors))


def test_a_lower_rank_is_the_truncated_singular_value_decomposition():
    mean = average([lora(seed) for seed in range(2)])
    shorter, error = truncate(mean, 3)
    assert (shorter.rank, shorter.alpha) == (3, 6.0)
    lost, whole = 0.0, 0.0
    for layer in SIZES:
        dense = update(mean, layer)
        u, values, v = torch.linalg.svd(dense)
        torch.testing.assert_close(update(shorter, layer), u[:, :3] * values[:3] @ v[:3], rtol=1e-4, atol=1e-4)
        lost += (dense - update(shorter, layer)).square().sum()
        whole += dense.square().sum()
    assert error == pytest.approx(float((lost / whole) ** 0.5), rel=1e-4)
    same, nothing = truncate(mean, mean.rank)
    torch.testing.assert_close(update(same, "blocks.0.to_q"), update(mean, "blocks.0.to_q"), rtol=1e-4, atol=1e-4)
    assert nothing == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="for the same layers. Found others in file 1"):
        average([lora(0), lora(1, sizes={"blocks.0.to_q": (12, 10)})])
    with pytest.raises(ValueError, match=r"a layer blocks.0.to_q of one size. Found \[\(8, 12\), \(10, 12\)\]"):
        average([lora(0), lora(1, sizes={**SIZES, "blocks.0.to_q": (12, 8)})])
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"`rank` must be in \[1, 4\]. Found {rank}"):
            truncate(lora(0), rank)
