"""Counting a GPU's memory and work without the GPU: fake tensors, which have shapes and no data, and a ledger of them.

Fake tensors are on the CPU, so that one way of counting runs, and is tested, on every machine. (A torch without CUDA aborts
where autograd meets a tensor that claims to be on a GPU.) One difference of a GPU is added: its autocast runs more functions
in float32. Attention needs nothing: on the CPU it uses the flash kernel, which keeps queries, keys, values, result and
log-sum-exp, as a GPU's flash and memory-efficient kernels do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T", bound=nn.Module)

FLOAT32_UNDER_CUDA = frozenset(
    (
        "layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "pow", "__pow__", "rsqrt", "exp", "log",
        "reciprocal", "sum", "prod", "cumsum", "cumprod", "norm", "interpolate", "mse_loss", "l1_loss", "smooth_l1_loss",
        "softplus", "cosine_similarity", "cdist",
    )
)  # fmt: skip
"""Functions that autocast computes in float32 on a GPU and leaves as they are on a CPU.

Source: PyTorch, Automatic Mixed Precision package, "CUDA Ops that can autocast to float32".
"""


ATEN = torch.ops.aten
CPU_ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu, ATEN._scaled_dot_product_flash_attention_for_cpu_backward
if CPU_ATTENTION[0] not in flop_registry:  # torch 2.13 knows the kernels of GPUs only

    @register_flop_formula(CPU_ATTENTION[0])
    def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]

    @register_flop_formula(CPU_ATTENTION[1])
    def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)  # type: ignore[no-any-return]


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the scales of quantised parameters, each tensor once."""
    found = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    for tensor in list(found.values()):
        state = getattr(tensor, "quant_state", None)
        while state is not None:  # bitsandbytes quantises scales too
            found |= {id(value): value for value in vars(state).values() if isinstance(value, Tensor)}
            state = state.state2
    return list(found.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take, memory that several of them share once.

    >>> weight = torch.zeros(3, 2)
    >>> bytes_of([weight, weight.T])
    24
    """
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all tensors made while it is on, as long as they live, and keeps the most there were at once.

    It also adds up floating-point operations: those of matrix products, convolutions and attention, two for each
    multiplication with its addition, as `torch.utils.flop_counter` does.

    `torch.distributed._tools.MemTracker` counts the same way, but refuses a network that is called several times within a
    step, as ours is (trained, old and no adapter), and needs a torch with distributed training.

    Args:
        known: Tensors from before, which are not counted, nor views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._alive: dict[int, ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two calls of three ask for it, and need not go further
        made = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(getattr(func, "overloadpacket", None)):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for each in made if isinstance(made, tuple | list) else (made,):
            for tensor in each if isinstance(each, tuple | list) else (each,):  # foreach operations return lists
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = ref(storage, partial(self._remove, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.live -= size


class CudaAutocast(TorchFunctionMode):
    """Makes the CPU's autocast, where it is on, run some functions in float32, as a GPU's does."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in FLOAT32_UNDER_CUDA and torch.is_autocast_enabled("cpu"):
            args = [_to_float32(each) for each in args]
            kwargs = {name: _to_float32(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


class Fakes:
    """Copies of modules on fake tensors, and counts of what is done with them.

    Args:
        cuda: Whether autocast is a GPU's.
    """

    def __init__(self, cuda: bool = True) -> None:
        self.cuda = cuda
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: list[Tensor] = []

    def copy(self, module: T, *parts: nn.Module) -> T:
        """A copy of a module on fake tensors, otherwise the same, hooks included.

        Args:
            module: What to copy. It does not change.
            parts: Modules that it holds, but not as modules of its own.
        """
        memo: dict[int, Any] = {}
        with self.mode, torch.no_grad():
            for tensor in tensors_of(module, *parts):
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        self._weights += memo.values()
        for tensor in tensors_of(module, *parts):
            if (state := getattr(tensor, "quant_state", None)) is not None:
                memo[id(tensor)].quant_state = copy.deepcopy(state, memo)
        return copy.deepcopy(module, memo)

    @contextmanager
    def counting(self, *given: Tensor) -> Iterator[Ledger]:
        """Count what is done within, beyond the weights and what is `given`; also where it fails."""
        ledger = Ledger([*self._weights, *given])
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.mode)
            stack.enter_context(ledger)
            stack.enter_context(self._autocast())
            yield ledger

    def _autocast(self) -> AbstractContextManager[Any]:
        return CudaAutocast() if self.cuda else nullcontext()

    def checkpoint(self, module: nn.Module, *arguments: Any) -> Any:
        """Gradient checkpointing as diffusers does it, with a GPU's autocast in the backward pass too."""
        contexts = partial(lambda: (nullcontext(), self._autocast()))  # torch leaves all modes in the backward pass
        return checkpoint(module, *arguments, use_reentrant=False, context_fn=contexts)
