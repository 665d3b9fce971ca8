"""Checks of what the three levels of a method receive and return, for every method, custom ones included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import wraps
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.merging import call_weights

Level = Callable[..., Any]


def checked_weights(method: Level) -> Level:
    """Wrap `weights`: float64 on the CPU as input, uniform weights for a zero Gram matrix, K finite numbers as output."""

    @wraps(method)
    def weights(self: Any, gram: Tensor) -> Tensor:
        gram = checked_gram(gram, list(compress(self.names, self.active.tolist())) if self.names else [])
        if not gram.any():
            return torch.full_like(gram[0], 1 / len(gram))  # all gradients are zero
        alpha = method(self, gram)
        if not isinstance(alpha, Tensor) or alpha.shape != gram.shape[:1] or not alpha.float().isfinite().all():
            raise ValueError(
                f"`{method.__qualname__}` must return a tensor of {len(gram)} numbers, one for each row of `gram`, that are "
                f"finite in float32. Found {alpha}."
            )
        return alpha

    return weights


def checked_columns(method: Level) -> Level:
    """Wrap `merge_rewards` or `merge_advantages`: the result is a tensor with the dtype of the input."""

    @wraps(method)
    def merge(self: Any, values: Tensor, *arguments: Any) -> Tensor:
        merged = method(self, values, *arguments)
        if not isinstance(merged, Tensor):
            raise ValueError(f"`{method.__qualname__}` must return a tensor. Found {type(merged).__name__}.")
        return merged.to(values.dtype)

    return merge


def without_infinity(method: Level, values: Tensor, *arguments: Any) -> Tensor:
    """Call `merge_rewards` or `merge_advantages` on harmless values.

    Raises:
        ValueError: The result has an infinity.
    """
    merged: Tensor = method(values, *arguments)
    if merged.isinf().any():
        raise ValueError(
            f"`{method.__qualname__}` must return numbers that are finite in {values.dtype}, or NaN where "
            "a sample has none. Found infinity; use smaller weights."
        )
    return merged


def checked_gram(gram: Float[Tensor, "row row"], names: Sequence[str] = ()) -> Float[Tensor, "row row"]:
    """A Gram matrix in float64 on the CPU.

    Args:
        gram: Inner products of the gradients.
        names: Rewards of the rows, for the error message; ignored unless there is one per row.

    Raises:
        ValueError: The matrix is not square or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"`gram` must have shape (K, K) with K >= 1. Found {tuple(gram.shape)}.")
    if not gram.isfinite().all():
        broken = ~gram.diagonal().isfinite()
        broken = broken if broken.any() else ~gram.isfinite().all(1)
        rows = names if len(names) == len(gram) else [f"row {row}" for row in range(len(gram))]
        raise ValueError(
            f"`gram` must be finite. Found NaN or infinity in the inner products of {', '.join(compress(rows, broken))}. "
            "Leave such gradients out before solving."
        )
    return gram.to("cpu", torch.float64)


LEVEL_CHECKS = {"weights": checked_weights, "merge_rewards": checked_columns, "merge_advantages": checked_columns}
"""Wrapper of each level that a method overrides."""


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Check the rewards' names against earlier ones; an empty `known` allows any names.

    Raises:
        ValueError: There is no reward, or the names differ from `known`.
    """
    if not names:
        raise ValueError("`rewards` must name at least one reward. Found none.")
    if known and tuple(names) != tuple(known):
        raise ValueError(
            f"`rewards` must stay the same and in the same order: {', '.join(known)}. Found {', '.join(names)}. "
            "Use the rewards the checkpoint was saved with, or start without it."
        )


def dry_run(balancer: Any) -> None:
    """Run every level of a copy of a balancer once on synthetic input, so that an error shows before the first rollout.

    Args:
        balancer: A `Balancer` with names.

    Raises:
        ValueError: A level returned a wrong shape, or `merge_rewards` or `merge_advantages` an infinity.
        TypeError: Several columns remain and the method does not override `weights`.
    """
    # Lightning sets these bound methods of the module: copying them would copy module and trainer
    loggers = [vars(balancer).get(name) for name in ("log", "log_dict")]
    copy, k = deepcopy(balancer, {id(logger): logger for logger in loggers}), len(balancer.reward_names)
    merged = without_infinity(copy.merge_rewards, torch.eye(k), torch.ones(k, k, dtype=torch.bool))
    columns = without_infinity(copy.merge_advantages, merged)
    if tuple(columns.shape) != (k, len(balancer.names)):
        raise ValueError(
            f"{type(balancer).__name__} must turn (samples, {k}) rewards into one column for each of "
            f"{', '.join(balancer.names)}. Found shape {tuple(columns.shape)} for {k} samples; set `merged_name` where "
            "`merge_rewards` or `merge_advantages` returns a single column."
        )
    if balancer.needs_gradients:
        call_weights(copy.weights, torch.eye(k, dtype=torch.float64), balancer.options.normalize)
