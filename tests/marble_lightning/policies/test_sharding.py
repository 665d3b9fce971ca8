"""A sharded base in one process: what it computes, and what it refuses. `test_processes` has two processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from marble_lightning import checks
from marble_lightning.policies.base import is_adapter
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.policies.sharding import ShardedBaseStrategy, blocks_of, shard_base
from tests.helpers.small_policies import outputs, shake


class SteppingStrategy(DDPStrategy):
    """Accumulates gradients and steps by itself, as DeepSpeed's does."""

    handles_gradient_accumulation = True


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_a_sharded_policy_predicts_the_same_with_whole_adapters(checkpoints, process_group):
    """In float32 too, where an adapter is merged into whole weights."""
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, text_length=4, dtype="float32")
    policy.setup(0)
    shake(policy, "old")
    before = {adapter: outputs(policy, adapter) for adapter in ("old", None)}
    shard_base(policy, DeviceMesh.from_group(process_group, "cpu"))
    for adapter, expected in before.items():
        torch.testing.assert_close(outputs(policy, adapter), expected, rtol=1e-5, atol=1e-6)
    for name, parameter in policy.transformer.named_parameters():
        assert isinstance(parameter, DTensor) != is_adapter(name), name


def test_a_transformer_without_known_blocks_is_refused():
    with pytest.raises(ValueError, match="ShardedBaseStrategy needs a transformer with blocks.* Found none in Linear"):
        blocks_of(SimpleNamespace(transformer=nn.Linear(2, 2)))


def test_evaluations_run_without_inference_mode(monkeypatch):
    """A forward pass in inference mode would leave weights that no later pass can gather."""
    monkeypatch.setattr(DDPStrategy, "setup", lambda *arguments: None)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=ShardedBaseStrategy(), logger=False)
    trainer.strategy.setup(trainer)
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop.val_loop):
        assert not loop.inference_mode


@pytest.mark.parametrize(
    ("devices", "settings", "message"),
    [
        (1, {}, "`trainer.devices` must be >= 2 with Sharded.* Found 1"),
        (2, {"compiled": True}, "`policy.compile` must be false"),
        (2, {"quantised": "nf4"}, "`policy.quantised` must be null .* Found nf4"),
    ],
)
def test_settings_that_a_sharded_base_does_not_support(devices, settings, message):
    policy = SimpleNamespace(**settings)
    with pytest.raises(ValueError, match=message):
        checks.check_strategy(SimpleNamespace(strategy=ShardedBaseStrategy(), num_devices=devices), policy)
    checks.check_strategy(SimpleNamespace(strategy=DDPStrategy(), num_devices=devices), policy)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(), SteppingStrategy()])
def test_other_strategies_are_refused_before_anything_is_loaded(strategy):
    with pytest.raises(ValueError, match=f"`trainer.strategy` must keep whole adapters .* Found {type(strategy).__name__}"):
        checks.check_strategy(SimpleNamespace(strategy=strategy, num_devices=1), SimpleNamespace())


@pytest.mark.parametrize(("images", "size", "larger"), [(9, 2, 3), (5, 1, 3), (13, 3, 4), (25, 2, 5)])
def test_processes_must_have_as_many_batches_of_held_out_images(images, size, larger):
    data = SimpleNamespace(held_out=[None] * images, held_out_batch_size=size)
    with pytest.raises(ValueError, match=rf"Found .* for {images} images on 2 processes; use .*_batch_size` {larger}\."):
        checks.check_held_out_batches(data, 2)
    data.held_out_batch_size = larger
    checks.check_held_out_batches(data, 2)
