"""Whether a checkpoint's adapters are those of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_adapters(
    state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], lora: Mapping[str, Any], path: str, names: Any
) -> None:
    """Refuse a checkpoint whose adapters are not those of a policy.

    Args:
        state: The policy's tensors, by name.
        checkpoint: What the file holds.
        lora: The policy's rank, alpha and targets.
        path: The policy's model.
        names: Says of a tensor's name whether it is an adapter's.

    Raises:
        ValueError: With what differs.
    """
    own, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if names(name)}
        for tensors in (state, checkpoint["state_dict"])
    )
    odd = sorted(set(own.items()) ^ set(theirs.items()))
    kept = checkpoint["lora"]
    # targets written otherwise, as `to_q` and `attn.to_q`, may name the same layers
    if any(kept[name] != lora[name] for name in ("rank", "alpha")) or (odd and kept["targets"] != lora["targets"]):
        raise ValueError(
            f"The checkpoint must hold adapters like this policy's: {lora}. Found {kept}; "
            "use the `policy` settings it was trained with (config.yaml in its run folder)."
        )
    if odd:
        name = odd[0][0]
        raise ValueError(
            f"The checkpoint must hold the adapters of {path}. Found another model's, of "
            f"{checkpoint['base_model'].get('model')}: {name} is {theirs.get(name, 'missing')} instead of "
            f"{own.get(name, 'missing')}; use the `policy.path` it was trained with."
        )
