"""Random adapters, and predictions of a policy."""

from __future__ import annotations

import torch

from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.utils.seeds import generator


@torch.no_grad()
def shake(policy: SD3Policy, adapter: str) -> None:
    for index, parameter in enumerate(policy.parameters_of(adapter)):
        parameter.add_(torch.randn(parameter.shape, generator=generator("shake", adapter, index)))


def outputs(policy: SD3Policy, adapter: str | None) -> torch.Tensor:
    conditions = policy.encode(["a red circle", "two squares"])
    noisy = torch.randn(2, 4, 8, 8, generator=generator("noisy"))
    with torch.no_grad(), policy.use_adapter(adapter):
        return policy.velocity(noisy, torch.tensor([0.3, 0.9]), conditions)
