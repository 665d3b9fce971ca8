"""Counting a device's memory without the device: fake tensors, which have shapes and no data, and a ledger of those alive.

Fake tensors are on the CPU, whatever device is meant, so that one way of counting runs, and is tested, on every machine. (A
torch without CUDA aborts where autograd meets a tensor that claims to be on a GPU.) What a GPU does otherwise is brought in:
blocks are multiples of 512 bytes, and autocast runs more functions in float32 (`CudaAutocast`). Attention needs no care:
on the CPU it takes the flash kernel, which keeps queries, keys, values, result and log-sum-exp, as a GPU's flash and
memory-efficient kernels do; the math kernel, which would keep all attention weights, is taken by neither.
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

T = TypeVar("T", bound=nn.Module)

CUDA_BLOCK = 512
"""Bytes that torch's CUDA allocator rounds up to."""

ONEDNN_LANES = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""Channels of a block in the layouts that a CPU's convolutions use, as many as fit into a vector register."""

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


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each tensor once."""
    found = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return list(found.values())


def text_encoders(policy: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders by name; those that are no part of the policy only visit its device."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: module for name in names if (module := getattr(policy.pipeline, name, None)) is not None}


def bytes_of(tensors: Iterable[Tensor], block: int = 1) -> int:
    """Bytes that tensors take, memory that several of them share once.

    Args:
        tensors: Real or fake ones, or such on `meta`.
        block: Every storage takes a multiple of so many bytes, >= 1.

    >>> weight = torch.zeros(3, 2)
    >>> bytes_of([weight, weight.T]), bytes_of([weight], CUDA_BLOCK)
    (24, 512)
    """
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(rounded(size, block) for size in storages.values())


def rounded(size: int, block: int) -> int:
    """`size` as a multiple of `block`."""
    return -(-size // block) * block


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all tensors made while it is on, as long as they live, and keeps the most there were at once.

    `torch.distributed._tools.MemTracker` counts the same way, but refuses a network that is called several times within a
    step, as ours is (trained, old and no adapter), and needs a torch with distributed training.

    Args:
        known: Tensors from before, which are not counted, nor views of them.
        block: Every storage takes a multiple of so many bytes, >= 1.
        lanes: Convolutions are oneDNN's, whose result is there twice before it is returned: first in a layout of its own,
            with channels in blocks of so many. 0: they are not.
    """

    def __init__(self, known: Iterable[Tensor] = (), block: int = 1, lanes: int = 0) -> None:
        super().__init__()
        self.block, self.lanes = block, lanes
        self.live = self.peak = 0
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._alive: dict[int, ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two calls of three ask for it, and need not go further
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            for tensor in each if isinstance(each, tuple | list) else (each,):  # foreach operations return lists
                if isinstance(tensor, Tensor):
                    self._see(tensor)
        if self.lanes and func is torch.ops.aten.convolution.default:
            padded = rounded(made.shape[1], self.lanes) * made.nbytes // made.shape[1]
            self.peak = max(self.peak, self.live + padded)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._alive:
            size = rounded(storage.nbytes(), self.block)
            self._alive[key] = ref(storage, partial(self._gone, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.live -= size


class Once(nn.Module):
    """A network that is run once; what it took then is what it takes on the next slice or tile of that shape."""

    def __init__(self, network: nn.Module, ledger: Ledger) -> None:
        super().__init__()
        self.network, self.ledger = network, ledger
        self.seen: dict[torch.Size, tuple[int, torch.Size]] = {}

    def forward(self, inputs: Tensor, *others: Any) -> Tensor:
        if inputs.shape in self.seen:
            took, shape = self.seen[inputs.shape]
            self.ledger.peak = max(self.ledger.peak, self.ledger.live + took)
            return inputs.new_empty(shape)
        before, live, self.ledger.peak = self.ledger.peak, self.ledger.live, self.ledger.live
        output: Tensor = self.network(inputs, *others)
        self.seen[inputs.shape] = self.ledger.peak - live, output.shape
        self.ledger.peak = max(before, self.ledger.peak)
        return output


class CudaAutocast(TorchFunctionMode):
    """Lets the CPU's autocast, where it is on, treat tensors as a GPU's would: some functions run in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in FLOAT32_UNDER_CUDA and torch.is_autocast_enabled("cpu"):
            args = [_widened(each) for each in args]
            kwargs = {name: _widened(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _moved(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """`module.to` for fake tensors, which torch cannot move as parameters; they are on the CPU, whatever device is meant."""
    _, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
    return module if dtype is None else type(module).to(module, *arguments, **options)


class Fakes:
    """A world of fake tensors: copies of modules without data, and counts of what is done with them.

    Args:
        block: Every storage takes a multiple of so many bytes, >= 1.
        cuda: Whether a GPU's autocast is meant.
    """

    def __init__(self, block: int = 1, cuda: bool = False) -> None:
        self.block, self.cuda = block, cuda
        self.lanes = 0 if cuda or not torch.backends.mkldnn.is_available() else ONEDNN_LANES
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: list[Tensor] = []

    def copy(
        self, module: T, parts: Sequence[nn.Module] = (), dtype: torch.dtype | None = None, fixed: Sequence[nn.Module] = ()
    ) -> T:
        """A copy on fake tensors, otherwise the same, hooks included. Nothing of the original is changed.

        Args:
            module: What to copy.
            parts: Modules that it holds, but not as modules of its own.
            dtype: What frozen weights are in; None leaves them as they are.
            fixed: Modules of it whose weights stay in their precision anyway.
        """
        memo: dict[int, Any] = {}
        originals = tensors_of(module, *parts)
        apart = {id(tensor) for tensor in tensors_of(*fixed)}
        with self.mode, torch.no_grad():
            for tensor in originals:
                frozen = isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.requires_grad
                kept = dtype if dtype is not None and frozen and id(tensor) not in apart else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept)
                memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        self._weights += memo.values()
        copied = copy.deepcopy(module, memo)
        for each in (*copied.modules(), *(inner for part in parts for inner in memo[id(part)].modules())):
            vars(each)["to"] = partial(_moved, each)
        return copied

    @contextmanager
    def counting(self, *given: Tensor) -> Iterator[Ledger]:
        """Count what is done within, beyond the weights and what is `given`; also where it fails."""
        ledger = Ledger([*self._weights, *given], self.block, self.lanes)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.mode)
            stack.enter_context(ledger)
            if self.cuda:
                stack.enter_context(CudaAutocast())
            yield ledger

    def checkpoint(self, module: nn.Module, *arguments: Any) -> Any:
        """Gradient checkpointing as diffusers does it.

        Torch leaves all modes in the backward pass; a GPU's autocast is entered again.
        """

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), CudaAutocast() if self.cuda else nullcontext()

        return checkpoint(module, *arguments, use_reentrant=False, context_fn=contexts)
