"""A low-rank update of a transformer by itself: without the model it was trained in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Lora:
    """A low-rank update of a transformer's linear layers: W + alpha / rank * B A.

    Args:
        tensors: A (rank, in) and B (out, rank) of every layer, as `{layer}.lora_A.weight` and `{layer}.lora_B.weight`.
        rank: Rank of every layer, >= 1.
        alpha: What the update is scaled by, times the rank.
        origin: Where it is from, for messages.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    origin: str

    @property
    def layers(self) -> list[str]:
        """Names of the layers, each once."""
        return list(dict.fromkeys(map(layer_of, self.tensors)))

    def scaled(self, by: float) -> dict[str, Tensor]:
        """Its tensors, every B multiplied."""
        return {name: tensor * by if ".lora_B." in name else tensor for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def copy_to(self, transformer: nn.Module, adapter: str) -> None:
        """Make one of the transformer's adapters equal to this.

        Raises:
            ValueError: It is not for those layers, all of them and no others, in their sizes.
        """
        own = {
            name.replace(f".{adapter}.", "."): parameter
            for name, parameter in transformer.named_parameters()
            if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name
        }
        modules = dict(transformer.named_modules())
        if unknown := [layer for layer in self.layers if layer not in modules]:
            raise ValueError(
                f"`policy.init_lora` must be for layers that the transformer has. Found {unknown[0]!r} in {self.origin}; "
                "it is for another model."
            )
        wanted, found = sorted(set(map(target_of, own))), sorted(set(map(target_of, self.tensors)))
        if wanted != found:
            raise ValueError(
                f"`policy.init_lora` must be for the policy's `targets`, {', '.join(wanted)}. Found {', '.join(found)} in "
                f"{self.origin}; set `policy.targets` to these."
            )
        if different := own.keys() ^ self.tensors.keys():
            missing = len(own.keys() - self.tensors.keys())
            raise ValueError(
                f"`policy.init_lora` must have every tensor of the policy's adapter and no other. Found {missing} missing "
                f"and {len(different) - missing} too many in {self.origin}, for example {min(different)!r}."
            )
        for name, parameter in own.items():
            if parameter.shape != self.tensors[name].shape:
                raise ValueError(
                    f"`policy.init_lora` must be for this transformer: {name!r} {tuple(parameter.shape)}. "
                    f"Found {tuple(self.tensors[name].shape)} in {self.origin}; it is for another model."
                )
        for name, parameter in own.items():
            parameter.copy_(self.tensors[name])


def layer_of(name: str) -> str:
    """The layer that a tensor of a LoRA belongs to.

    >>> layer_of("transformer_blocks.3.attn2.to_out.0.lora_A.weight")
    'transformer_blocks.3.attn2.to_out.0'
    """
    return name.partition(".lora_")[0]


def target_of(name: str) -> str:
    """What the layers of one kind have in common, as a policy's `targets` name them.

    >>> target_of("transformer_blocks.3.attn2.to_out.0.lora_A.weight")
    'attn2.to_out.0'
    """
    return re.sub(r"^transformer_blocks\.\d+\.", "", layer_of(name))
