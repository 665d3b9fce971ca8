"""Balancers of three rewards, and single optimizer steps."""

from __future__ import annotations

import torch

from balancers import Balancer

NAMES = ("clip", "ocr", "pick")


def bound(balancer, names=NAMES):
    balancer.bind(names)
    return balancer


def step(balancer, gradients, n_micro_batches=1, samples=None):
    """One optimizer step. Returns the merged gradient (None without a refresh) and the coefficients in use."""
    merged = None
    balancer.begin_step(n_micro_batches)
    while balancer.wants_gradients:
        balancer.add_gradients(gradients, samples)
        if not balancer.wants_gradients:
            merged = balancer.solve(lambda x: x)
    coefficients = balancer.loss_weights
    balancer.end_step()
    return merged, coefficients


def gradients_of(seed, k=3, p=7):
    return torch.randn(k, p, generator=torch.Generator().manual_seed(seed))


def gram_of(seed: int, k: int = 5, p: int = 8, push: float = 0.0) -> torch.Tensor:
    """Inner products of random gradients; `push` > 0 makes them conflict more."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(k, p, generator=generator, dtype=torch.float64)
    gradients = gradients - push * gradients.mean(0)
    gradients = gradients * torch.rand(k, 1, generator=generator, dtype=torch.float64).add(0.1)
    return gradients @ gradients.T


class Scripted(Balancer):
    """Returns prepared weights, so that tests can compute the results by hand."""

    def __init__(self, *prepared, **options):
        super().__init__(**options)
        self.prepared, self.grams = list(prepared), []

    def weights(self, gram):
        self.grams.append(gram)
        return torch.tensor(self.prepared[len(self.grams) - 1], dtype=torch.float64)
