"""Random generators with one seed per purpose, so that a resumed run draws the same numbers as an uninterrupted one."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, in order: seed, round, rank, purpose, index."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed(*key)`."""
    return torch.Generator().manual_seed(derived_seed(*key))
