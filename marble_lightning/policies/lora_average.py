"""Averages of low-rank updates: the exact mean, and its best approximation of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marble_lightning.policies.lora import Lora
from marble_lightning.utils.validation import require


def average(loras: Sequence[Lora]) -> Lora:
    r"""The exact mean of several updates, $\frac 1 n \sum_i s_i B_i A_i$ with $s_i = \alpha_i / r_i$, by concatenation.

    Returns:
        A LoRA whose rank is the sum of the ranks, with the first one's $\alpha / r$.

    Raises:
        ValueError: They are for different layers, or for layers of different sizes.
    """
    first, *others = loras
    for lora in others:
        require(set(lora.layers) == set(first.layers), "All LoRAs must be for the same layers", f"others in {lora.origin}")
    scales = [lora.alpha / lora.rank / len(loras) for lora in loras]
    scale, tensors = first.alpha / first.rank, dict[str, Tensor]()
    for layer in first.layers:
        down, up = (f"{layer}.lora_{side}.weight" for side in "AB")
        sizes = {(lora.tensors[down].shape[1], lora.tensors[up].shape[0]) for lora in loras}
        require(len(sizes) == 1, f"All LoRAs must be for a layer {layer} of one size", sorted(sizes))
        tensors[down] = torch.cat([lora.tensors[down] for lora in loras])
        tensors[up] = torch.cat([lora.tensors[up] * (own / scale) for lora, own in zip(loras, scales, strict=True)], dim=1)
    rank = sum(lora.rank for lora in loras)
    return Lora(tensors, rank, scale * rank, ", ".join(lora.origin for lora in loras))


def truncate(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The update of a lower rank that is nearest to a LoRA's in every layer, by singular values.

    Returns:
        The LoRA, with the same alpha / rank, and the norm of what is lost divided by the norm of the update.

    Raises:
        ValueError: The rank is not between 1 and the LoRA's, or exceeds the size of a layer.
    """
    require(1 <= rank <= lora.rank, f"`rank` must be in [1, {lora.rank}]", rank)
    scale, tensors = lora.alpha / lora.rank, dict[str, Tensor]()
    lost, whole = 0.0, 0.0
    for layer in lora.layers:
        down, up = (f"{layer}.lora_{side}.weight" for side in "AB")
        a, b = lora.tensors[down].double(), lora.tensors[up].double()
        require(rank <= min(a.shape[1], b.shape[0]), f"`rank` must be at most the size of {layer}", rank)
        left, middle = torch.linalg.qr(b)  # the product of the small factors has the same singular values
        right, other = torch.linalg.qr(a.T)
        u, values, v = torch.linalg.svd(middle @ other.T)
        roots = values[:rank].sqrt()
        tensors[up] = (left @ u[:, :rank] * roots).to(lora.tensors[up])
        tensors[down] = (roots[:, None] * v[:rank] @ right.T).to(lora.tensors[down])
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    error = (lost / whole) ** 0.5 if whole else 0.0
    return Lora(tensors, rank, scale * rank, lora.origin), error
