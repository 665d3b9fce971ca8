"""A cache of encoded prompts on disk, so that text encoders run once per prompt and not once per run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from marble_lightning.policies.base import Conditions
from marble_lightning.utils.atomic_files import atomic_write
from rewards.texts import excerpt

ENDS = 256
"""Number of elements from either end of every tensor that enter the fingerprint."""


def fingerprint(encoders: Mapping[str, nn.Module], *settings: object) -> str:
    """Hash of modules, such as text encoders, and settings: names, shapes, types and ends of tensors, and the settings.

    Args:
        encoders: Modules by name.
        settings: Other values that the encoding depends on.
    """
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=12)
    for encoder, module in encoders.items():
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().reshape(-1)
            ends = torch.cat([flat[:ENDS], flat[-ENDS:]]).double().cpu()
            digest.update(repr((encoder, name, tuple(tensor.shape), tensor.dtype)).encode() + ends.numpy().tobytes())
    return digest.hexdigest()


class PromptCache:
    """Encoded prompts, one file each, in a folder named after the fingerprint of the encoders.

    Files are written atomically, so that processes can share the folder.

    Args:
        folder: Folder of all caches.
        encoders: The encoders' `fingerprint`.
    """

    def __init__(self, folder: str | Path, encoders: str) -> None:
        self.folder = Path(folder).expanduser() / encoders
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, text: str) -> Conditions | None:
        """The cached encoding of a prompt, a batch of one on the CPU; None if there is none.

        Raises:
            ValueError: The file is damaged.
        """
        file = self._file(text)
        if not file.exists():
            return None
        try:
            return Conditions(**load_file(file))
        except (SafetensorError, TypeError) as error:
            raise ValueError(
                f"`prompt_cache` must hold whole files. Found a damaged one, {file}, for {excerpt(text)}: {error}; "
                "delete it."
            ) from error

    def put(self, text: str, encoded: Conditions) -> None:
        """Store a prompt's encoding, a batch of one."""
        file = self._file(text)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in encoded.tensors.items()}
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, {"prompt": text})

    def _file(self, text: str) -> Path:
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
