"""A low-rank update of a transformer, without the transformer itself."""

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
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        origin: File that it comes from, for error messages.
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
        """The tensors with every B multiplied by a factor."""
        return {name: tensor * by if ".lora_B." in name else tensor for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def copy_to(self, transformer: nn.Module, adapter: str) -> None:
        """Copy this LoRA to one of the transformer's adapters.

        Raises:
            ValueError: Layers or sizes differ from those of the adapter.
        """
        parameters = {
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
        policy_targets, lora_targets = (sorted(set(map(target_of, names))) for names in (parameters, self.tensors))
        if policy_targets != lora_targets:
            raise ValueError(
                f"`policy.init_lora` must be for the policy's `targets`, {', '.join(policy_targets)}. Found "
                f"{', '.join(lora_targets)} in {self.origin}; set `policy.targets` to these."
            )
        if different := parameters.keys() ^ self.tensors.keys():
            missing = len(parameters.keys() - self.tensors.keys())
            raise ValueError(
                f"`policy.init_lora` must have every tensor of the policy's adapter and no other. Found {missing} missing "
                f"and {len(different) - missing} too many in {self.origin}, for example {min(different)!r}."
            )
        for name, parameter in parameters.items():
            if parameter.shape != self.tensors[name].shape:
                raise ValueError(
                    f"`policy.init_lora` must be for this transformer: {name!r} {tuple(parameter.shape)}. "
                    f"Found {tuple(self.tensors[name].shape)} in {self.origin}; it is for another model."
                )
        for name, parameter in parameters.items():
            parameter.copy_(self.tensors[name])


def layer_of(name: str) -> str:
    """The layer of a LoRA tensor, from the tensor's name.

    >>> layer_of("transformer_blocks.3.attn2.to_out.0.lora_A.weight")
    'transformer_blocks.3.attn2.to_out.0'
    """
    return name.partition(".lora_")[0]


def target_of(name: str) -> str:
    """The target of a LoRA tensor as in a policy's `targets`: the layer's name within a transformer block.

    >>> target_of("transformer_blocks.3.attn2.to_out.0.lora_A.weight")
    'attn2.to_out.0'
    >>> target_of("layers.3.attention.to_q.lora_B.weight")
    'attention.to_q'
    """
    return re.sub(r"^\w+\.\d+\.", "", layer_of(name))
