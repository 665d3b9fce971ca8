"""Encoded prompts on disk, so that text encoders run once per prompt and not once per run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marble_lightning.policies.base import Conditions
from marble_lightning.utils.atomic_files import atomic_write
from rewards.texts import excerpt

ENDS = 256
"""Elements from either end of every tensor that tell one set of weights from another."""


def fingerprint(encoders: Mapping[str, nn.Module], *settings: object) -> str:
    """A name for what text encoders make of a prompt: their tensors' names, shapes, types and ends, and the settings.

    Args:
        encoders: By name.
        settings: Whatever else the encoding depends on.
    """
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=12)
    for encoder, module in encoders.items():
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().reshape(-1)
            ends = torch.cat([flat[:ENDS], flat[-ENDS:]]).double().cpu()
            digest.update(repr((encoder, name, tuple(tensor.shape), tensor.dtype)).encode() + ends.numpy().tobytes())
    return digest.hexdigest()


class PromptCache:
    """Encoded prompts, one file each, in a folder named after the encoders that made them.

    A file is complete as soon as it has its name, so that processes may share the folder.

    Args:
        folder: Where caches are kept.
        encoders: What `fingerprint` gave.
    """

    def __init__(self, folder: str | Path, encoders: str) -> None:
        self.folder = Path(folder).expanduser() / encoders
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, text: str) -> Conditions | None:
        """What was kept of a prompt, a batch of one on the CPU; None where nothing was.

        Raises:
            ValueError: The file is damaged.
        """
        file = self._file(text)
        if not file.exists():
            return None
        try:
            found = load_file(file)
            return Conditions(found["embeds"], found["pooled"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"`prompt_cache` must hold whole files. Found a damaged one, {file}, for {excerpt(text)}: {error}; "
                "delete it."
            ) from error

    def put(self, text: str, encoded: Conditions) -> None:
        """Keep a prompt's encoding, a batch of one."""
        file = self._file(text)
        tensors: dict[str, Float[Tensor, "1 ..."]] = {"embeds": encoded.embeds, "pooled": encoded.pooled}
        with atomic_write(file) as beside:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, beside, {"prompt": text})

    def _file(self, text: str) -> Path:
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
