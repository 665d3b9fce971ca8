"""A strategy that shards the frozen transformer over the GPUs of a machine, and trains replicated adapters."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from marble_lightning.policies.base import ADAPTERS, FlowPolicy


class ShardedBaseStrategy(DDPStrategy):
    """DDPStrategy with the frozen transformer sharded over the processes of each machine, for bases too large for one GPU.

    Each process keeps an equal part of every frozen weight. FSDP2 gathers a transformer block before it runs, in a forward
    or backward pass, and frees it afterwards. Adapters, autoencoder and text encoders stay whole in every process, and
    gradients are reduced as by DDPStrategy.

    All processes must run the transformer equally often, since they gather its weights together.

    Args:
        timeout: Longest time that processes wait for one another.
        process_group_backend: `nccl`, `gloo` or another backend; null for that of the device.
    """

    before_sharding: Callable[[], object] = staticmethod(lambda: None)
    """Called while the transformer is still whole and on the CPU."""

    def __init__(self, timeout: timedelta = default_pg_timeout, process_group_backend: str | None = None) -> None:
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)

    def setup(self, trainer: Trainer) -> None:
        """Set up the model, and evaluations without inference mode, in which weights cannot be gathered for later passes."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Shard the transformer block by block, then move everything else."""
        policy: Any = self.lightning_module.policy  # type: ignore[union-attr]
        if not policy.sharded:
            self.before_sharding()
            machine, _ = distributed.new_subgroups(self.num_processes, timeout=self._timeout)
            shard_base(policy, DeviceMesh.from_group(machine, self.root_device.type))
        super().model_to_device()


def shard_base(policy: FlowPolicy, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of a policy's transformer, and move them to the devices of a mesh.

    Args:
        policy: A policy after `setup`. Its adapters stay as they are.
        mesh: One dimension, the processes that share the weights.
    """
    adapters = {parameter for name in ADAPTERS for parameter in policy.parameters_of(name)}
    for module in (*blocks_of(policy), policy.transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    policy.sharded = True


def blocks_of(policy: FlowPolicy) -> list[nn.Module]:
    """The blocks of a policy's transformer, instances of the classes that diffusers never splits over devices.

    Raises:
        ValueError: The transformer has none.
    """
    names = getattr(policy.transformer, "_no_split_modules", None) or ()
    blocks = [module for module in policy.transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            "ShardedBaseStrategy needs a transformer with blocks, whose classes `_no_split_modules` names. Found none in "
            f"{type(policy.transformer).__name__}; set it, or use another `trainer.strategy`."
        )
    return blocks
