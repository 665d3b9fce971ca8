"""A custom flow model: a two-layer network on 32 x 32 images, which are their own latents."""

import hashlib
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from marble_lightning import FlowPolicy
from marble_lightning.policies.base import Conditions

SIDE, WIDTH = 32, 8


class ToyNetwork(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Velocity of noisy images; PeftAdapterMixin gives it `add_adapter`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * SIDE**2 + 1 + WIDTH, 64)
        self.outer = nn.Linear(64, 3 * SIDE**2)

    def forward(self, noisy, t, pooled):
        features = torch.cat([noisy.flatten(1), t[:, None], pooled], dim=1)
        return self.outer(self.inner(features).tanh()).view_as(noisy)


class ToyFlow(FlowPolicy):
    """A flow model that is trained like any other."""

    resolution = SIDE

    def __init__(self, rank: int = 4, alpha: float = 8) -> None:
        super().__init__(path="toy", revision=None, rank=rank, alpha=alpha, targets=["inner", "outer"])

    # Load it

    def setup(self, seed):
        if hasattr(self, "transformer"):  # called often, works once
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.transformer = ToyNetwork().requires_grad_(False).eval()
        self.add_adapters(seed)

    # Say which prompts and sizes it takes

    def check_resolution(self, name, resolution):
        if resolution != SIDE:
            raise ValueError(f"`{name}` must be {SIDE}. Found {resolution}.")

    @property
    def max_prompt_tokens(self):
        return 77

    def truncated_prompts(self, texts):
        return [text for text in texts if len(text.split()) > self.max_prompt_tokens]

    # Encode, sample, decode

    def encode(self, texts):
        digests = [hashlib.sha256(text.encode()).digest()[:WIDTH] for text in texts]
        pooled = torch.tensor([list(digest) for digest in digests], device=self.device) / 255
        return Conditions(embeds=pooled[:, None], pooled=pooled)

    @torch.no_grad()
    def sample(
        self, conditions, generators, adapter, *, steps, solver, guidance=1.0, unconditional=None, resolution=None
    ):  # Euler steps for any `solver`, and no guidance: this is a toy
        x = torch.stack([torch.randn(3, SIDE, SIDE, generator=noise) for noise in generators]).to(self.device)
        times = [*self.sigmas(steps).tolist(), 0.0]
        with self.use_adapter(adapter):
            for t, following in pairwise(times):
                x = x + (following - t) * self.velocity(x, torch.full((len(x),), t, device=x.device), conditions)
        return x

    def decode(self, latents):
        return latents.float().sigmoid()  # in [0, 1]

    # The network and its grid of times

    def velocity(self, noisy, t, conditions):
        return self.transformer(noisy, t, conditions.pooled).float()

    def sigmas(self, steps):
        return torch.linspace(1, 1 / steps, steps)
