"""Loading of a pipeline, with checks for missing or non-finite weights and incomplete tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from rewards.checkpoints import non_finite_weights
from rewards.hub import hub_reason

PADDING = 128
"""Some embedding tables, such as those of T5 and Qwen, are padded to a multiple of this size."""

MAX_SPARE = 512
"""Maximum number of rows that are padding; Qwen's table has 267."""


def load_pipeline(
    path: str,
    index: dict[str, Any],
    dtype: torch.dtype,
    revision: str | None,
    without: Iterable[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Any:
    """Load the pipeline on the CPU, as its model_index.json says.

    Args:
        path: Folder in diffusers format, or hub id.
        index: Its model_index.json.
        dtype: Precision of the weights.
        revision: Revision of a hub id.
        without: Parts that are left out.
        dtypes: Precision of parts that differ from `dtype`, by name.

    Raises:
        ValueError: A file is missing or damaged, a tensor is missing or not finite, or a tokenizer does not fit its text
            encoder.
    """
    parts: dict[str, Any] = dict.fromkeys(without)
    names = [name for name, (library, _) in _parts(index) if name not in parts and library == "transformers"]
    for name in ("transformer", "vae", *(name for name in names if name.startswith("text_encoder"))):
        model_class = getattr(transformers if name in names else diffusers, index[name][1])
        parts[name] = load_part(model_class, name, path, (dtypes or {}).get(name, dtype), revision)
    try:
        pipeline: Any = getattr(diffusers, index["_class_name"])
        pipeline = pipeline.from_pretrained(path, dtype=dtype, revision=revision, **parts)
    except (OSError, ValueError) as error:
        raise _unreadable("tokenizers and scheduler", path, error) from error
    for suffix in ("", "_2", "_3"):
        if (encoder := getattr(pipeline, f"text_encoder{suffix}", None)) is not None:
            _check_tokenizer(f"tokenizer{suffix}", getattr(pipeline, f"tokenizer{suffix}"), encoder.config, path)
    return pipeline


def _parts(index: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(name, value) for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]]


def load_part(
    model_class: Any, name: str, path: str, dtype: torch.dtype, revision: str | None, setting: str = "policy.path"
) -> nn.Module:
    """Load one part of a pipeline on the CPU.

    Args:
        model_class: Its class.
        name: Its name, which is that of its folder too.
        path: Folder in diffusers format, or hub id.
        dtype: Precision of the weights.
        revision: Revision of a hub id.
        setting: Name of the setting with the path, for error messages.

    Raises:
        ValueError: A file is missing or damaged, or a tensor is missing or not finite.
    """
    options = {"subfolder": name, "dtype": dtype, "revision": revision, "output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(name, path, error, setting) from error
    # the libraries initialise missing tensors at random
    if missing := sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}):
        raise ValueError(
            f"`{setting}` must hold every tensor of its {name}. Found {len(missing)} missing or of another shape in "
            f"{path!r}, such as {missing[0]}. Download it again."
        )
    if broken := non_finite_weights(model):
        raise ValueError(
            f"`{setting}` must hold finite numbers. Found others in {len(broken)} tensors of the {name} in {path!r}, such "
            f"as {broken[0]}, read as {str(dtype)[6:]}. Download it again, or choose `policy.dtype` bfloat16 or float32."
        )
    return model


def _unreadable(name: str, path: str, error: Exception, setting: str = "policy.path") -> ValueError:
    return ValueError(
        f"`{setting}` must hold a whole pipeline. Found {path!r}, whose {name} cannot be loaded: {hub_reason(error, path)}."
    )


def _check_tokenizer(name: str, tokenizer: Any, config: Any, path: str) -> None:
    """Check that a tokenizer is complete: if its files are missing, the libraries build an almost empty one."""
    spare = 1 if config.vocab_size % PADDING else MAX_SPARE
    if tokenizer is None or not config.vocab_size - spare < len(tokenizer) <= config.vocab_size:
        raise ValueError(
            f"`policy.path` must hold a {name} with the {config.vocab_size} tokens of its text encoder. Found "
            f"{0 if tokenizer is None else len(tokenizer)} in {path!r}. Put that model's tokenizer files into {name}."
        )
    max_length = config.max_position_embeddings if config.model_type.startswith("clip") else None
    if max_length is not None and tokenizer.model_max_length > max_length:
        raise ValueError(
            f"`policy.path` must hold a {name} whose tokenizer_config.json has a `model_max_length` of at most "
            f"{max_length}, the positions of its text encoder. Found {tokenizer.model_max_length:g} in {path!r}. "
            "Use that model's file."
        )
