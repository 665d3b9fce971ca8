"""Names of LoRA files of PEFT, converted to those of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

PREFIX = "transformer."
"""Prefix of the transformer's tensors and settings in files of diffusers."""

UNSUPPORTED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
"""Fields of a LoraConfig that make the update differ from alpha / rank * B A."""

PEFT_PREFIX = "base_model.model."
"""Prefix of all tensors that `PeftModel.save_pretrained` writes."""


def to_diffusers(state: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a file's tensors to diffusers' names.

    Args:
        state: The tensors, by their names in the file.
        file: The file. A PEFT file needs its adapter_config.json in the same folder.

    Returns:
        The tensors, and the fields of the LoraConfig in files that have it outside their header, else none.

    Raises:
        ValueError: The format is PEFT's, and the settings are not beside the file or not those of a LoRA.
    """
    if any(name.startswith(PEFT_PREFIX) for name in state):
        return {
            PREFIX + name.removeprefix(PEFT_PREFIX) if name.startswith(PEFT_PREFIX) else name: tensor
            for name, tensor in state.items()
        }, _peft_config(file)
    return dict(state) if any("lora_A" in name for name in state) else convert_unet_state_dict_to_peft(state), {}


def some(names: Sequence[str]) -> str:
    """The first three of some names, and the number of the others.

    >>> some(["a", "b"]), some(["a", "b", "c", "d"])
    ("'a', 'b'", "'a', 'b', 'c' and 1 more")
    """
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _peft_config(file: Path) -> dict[str, Any]:
    """The settings beside a PEFT file, which does not hold its alpha."""
    if not (file.parent / CONFIG_NAME).is_file():
        raise ValueError(
            f"`policy.init_lora` must have {CONFIG_NAME} in its folder if it is a PEFT file: alpha is in it. Found none "
            f"beside {file}; copy it there."
        )
    config = PeftConfig.from_pretrained(str(file.parent))
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"`policy.init_lora` must be a LoRA. Found a {type(config).__name__} in {file.parent / CONFIG_NAME}."
        )
    return {name: getattr(config, name) for name in ("r", "lora_alpha", *UNSUPPORTED)}
