"""A base with weights in four bits: errors, velocities, gradients, memory and work. Most tests need bitsandbytes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from balancers import MARBLE
from marble_lightning.checks import check_same_weights
from marble_lightning.command_line import QUIET
from marble_lightning.memory.ledger import Fakes, bytes_of, tensors_of
from marble_lightning.policies import quantised
from marble_lightning.policies.base import ADAPTERS
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.small_policies import outputs, shake
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


def policy_with(checkpoints, dtype="float32", **options) -> SD3Policy:
    return SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, text_length=4, dtype=dtype, **options)


@pytest.fixture
def policy(checkpoints) -> SD3Policy:
    pytest.importorskip("bitsandbytes")
    policy = policy_with(checkpoints, quantised="nf4")
    policy.setup(seed=0)
    return policy


def test_a_missing_package_is_reported_before_weights_load(checkpoints, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes. Found none; `pip install 'marble-lightning\["):
        policy_with(checkpoints, quantised="nf4").setup(seed=0)
    policy_with(checkpoints).check()


def test_wrong_settings(checkpoints):
    with pytest.raises(ValueError, match=r"`policy.quantised` must be nf4 or null. Found 'int8'"):
        policy_with(checkpoints, quantised="int8")
    with pytest.raises(ValueError, match=r"`policy.compile` must be false"):
        policy_with(checkpoints, quantised="nf4", compile=True)


def test_only_a_quantised_base_is_named_in_the_identity(checkpoints):
    plain, four_bits = (policy_with(checkpoints, quantised=kind).identity for kind in (None, "nf4"))
    assert four_bits == plain | {"quantised": "nf4"}


def test_linear_layers_are_quantised_and_adapters_are_not(policy):
    bases = [layer.get_base_layer() for layer in policy._lora_layers]
    assert all(base.weight.dtype == torch.uint8 for base in bases)
    exact = [name for name, layer in policy.transformer.named_modules() if type(layer) is nn.Linear]
    assert exact
    assert all(".lora_" in name for name in exact)
    assert {parameter.dtype for name in ADAPTERS for parameter in policy.parameters_of(name)} == {torch.float32}
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in policy.parameters_of("trained")}


def test_velocities_are_near_the_base_and_adapters_are_independent(policy, checkpoints):
    plain = policy_with(checkpoints)
    plain.setup(seed=0)
    exact, base = outputs(plain, None), outputs(policy, None)
    assert 1e-3 < (base - exact).norm() / exact.norm() < 0.3  # this small network has weights of one block of 64 each
    shake(policy, "trained")
    assert (outputs(policy, "trained") - base).abs().max() > 1e-3
    for adapter in (None, "old", "ema"):
        torch.testing.assert_close(outputs(policy, adapter), base)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-mixed")])
def test_per_reward_gradients_of_a_run(checkpoints, tmp_path, dtype, precision):
    """Two backward passes for all rewards and one for each give the same gradients, with gradient checkpointing too."""
    pytest.importorskip("bitsandbytes")
    found = []
    for passes, checkpointing in (("per_reward", False), ("two", False), ("two", True)):
        policy = policy_with(checkpoints, dtype, quantised="nf4", gradient_checkpointing=checkpointing)
        _, seen = run(
            checkpoints, tmp_path, MARBLE(refresh_every=2), policy=policy, precision=precision, gradient_passes=passes
        )
        found.append(torch.stack(seen.gradients))
    assert found[0].norm(dim=1).min() > 0
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for other in found[1:]:
        assert (other - found[0]).norm() / found[0].norm() < tolerance


def test_memory_and_work_are_counted(checkpoints):
    """Fake weights have the bytes of real ones; the work is that of a base in bfloat16, and activations take no more."""
    pytest.importorskip("bitsandbytes")
    found = []
    for kind in (None, "nf4"):
        policy, fakes = policy_with(checkpoints, "bfloat16", quantised=kind), Fakes()
        policy.setup(seed=0)
        copied = fakes.copy(policy, *policy.text_encoders.values())
        assert bytes_of(tensors_of(copied)) == bytes_of(tensors_of(policy))
        conditions = policy.encode(["a red circle"])
        with fakes.counting(*conditions.tensors.values()) as ledger, torch.autocast("cpu", torch.bfloat16):
            copied.velocity(torch.empty(1, 4, 8, 8), torch.empty(1), conditions).sum().backward()
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            policy.velocity(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), conditions).sum().backward()
        assert counter.get_total_flops() == ledger.flops
        found.append((policy, ledger))
    (plain, exact), (policy, four_bits) = found
    assert four_bits.flops == exact.flops
    assert 0 < four_bits.peak <= exact.peak
    layers = [policy._lora_layers[0].get_base_layer(), plain._lora_layers[0].get_base_layer()]
    weight, state = layers[0].weight, layers[0].weight.quant_state
    kept = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert {id(tensor) for tensor in kept} <= {id(tensor) for tensor in tensors_of(policy)}
    assert weight.nbytes == layers[1].weight.nbytes / 4
    assert state.absmax.nbytes == weight.nbytes / 32


def test_processes_compare_quantised_weights(policy, monkeypatch):
    other = copy.deepcopy(policy)
    other._lora_layers[0].get_base_layer().weight.data.view(-1)[0] += 1
    trainer = SimpleNamespace(world_size=2)
    prints = []
    monkeypatch.setattr("marble_lightning.checks.gather_items", lambda items: prints.append(items[0]) or prints)
    check_same_weights(trainer, policy, {})
    with pytest.raises(ValueError, match=r"different ones of policy"):
        check_same_weights(trainer, other, {})
