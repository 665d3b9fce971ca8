"""Check that a checkpoint's adapters fit a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def check_adapters(
    state: Mapping[str, Tensor],
    checkpoint: Mapping[str, Any],
    lora: Mapping[str, Any],
    path: str,
    is_adapter: Callable[[str], bool],
) -> None:
    """Refuse a checkpoint with adapters that differ from the policy's in name, shape or LoRA settings.

    Args:
        state: The policy's tensors, by name.
        checkpoint: Content of the checkpoint.
        lora: The policy's rank, alpha and targets.
        path: Path of the policy's model.
        is_adapter: Whether a tensor of a given name belongs to an adapter.

    Raises:
        ValueError: The adapters differ; the message names the difference.
    """
    expected, actual = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if is_adapter(name)}
        for tensors in (state, checkpoint["state_dict"])
    )
    differences = sorted(set(expected.items()) ^ set(actual.items()))
    saved = checkpoint["lora"]
    # different spellings of a target, such as `to_q` and `attn.to_q`, may name the same layers
    if any(saved[name] != lora[name] for name in ("rank", "alpha")) or (differences and saved["targets"] != lora["targets"]):
        raise ValueError(
            f"The checkpoint must hold adapters like this policy's: {lora}. Found {saved}; "
            "use the `policy` settings it was trained with (config.yaml in its run folder)."
        )
    if differences:
        name = differences[0][0]
        raise ValueError(
            f"The checkpoint must hold the adapters of {path}. Found another model's, of "
            f"{checkpoint['base_model'].get('model')}: {name} is {actual.get(name, 'missing')} instead of "
            f"{expected.get(name, 'missing')}; use the `policy.path` it was trained with."
        )
