"""A transformer whose frozen linear layers are kept in four bits, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula


def check_bitsandbytes() -> None:
    """Check that bitsandbytes is installed, without an import of it.

    Raises:
        ValueError: It is not.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "`policy.quantised: nf4` needs the package bitsandbytes. Found none; "
            "`pip install 'marble-lightning[quantised]'`, or set `policy.quantised: null`."
        )


def quantise(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Replace a transformer's linear layers by layers whose weights have four bits, in place and on its device.

    Weights are NF4 in blocks of 64, and the blocks' scales are in eight bits: 0.516 bytes a weight. Biases stay.

    Args:
        transformer: Frozen, and without adapters.
        dtype: Precision that the products are computed in, that of the other weights.

    Source: QLoRA, arXiv 2305.14314.
    """
    import bitsandbytes

    for parent in list(transformer.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, _in_four_bits(bitsandbytes.nn, layer, dtype))
    transformer.is_loaded_in_4bit = True  # type: ignore[assignment] # where this is set, peft knows such layers
    _count_flops(torch.ops.bitsandbytes.gemm_4bit)


def _in_four_bits(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    sizes, device = (layer.in_features, layer.out_features), layer.weight.device
    new: Any = library.Linear4bit(*sizes, layer.bias is not None, dtype, quant_type="nf4", device="meta")
    new.weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.bias = layer.bias
    new.support_avx512bf16_for_cpu = False  # its layout on such a CPU is for inference and has no gradients
    new.register_forward_pre_hook(_to_compute_dtype)
    return new.to(device)  # type: ignore[no-any-return] # this quantises the weight


def _to_compute_dtype(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a layer's input, so that its output is in half precision too, as that of a linear layer under autocast."""
    return tuple(each.to(layer.compute_dtype) for each in inputs)


def _count_flops(product: Any) -> None:
    """Let torch's counter, and so the estimates of work, know the product with four-bit weights."""
    if product not in flop_registry:

        @register_flop_formula(product)
        def _forward(inputs: Any, *_: Any, out_shape: Any, **__: Any) -> int:
            return 2 * prod(out_shape) * int(inputs[-1])
