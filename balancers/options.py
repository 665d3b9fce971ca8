"""Checks of what all balancers share: their options and the rewards' names."""

from collections.abc import Sequence


def check_options(
    refresh_every: int,
    ema_decay: float,
    amortize: str,
    refresh_alpha: str,
    estimate_share: float,
    uniform_after_step: int | None,
) -> None:
    """Raise if an option of `Balancer` is out of its range.

    Raises:
        ValueError: says which, the range and what was found.
    """
    if refresh_every < 1:
        raise ValueError(f"`refresh_every` must be >= 1. Found {refresh_every}.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"`ema_decay` must be in [0, 1). Found {ema_decay}.")
    if amortize not in ("raw", "scaled"):
        raise ValueError(f"`amortize` must be 'raw' or 'scaled'. Found {amortize!r}.")
    if refresh_alpha not in ("smoothed", "fresh"):
        raise ValueError(f"`refresh_alpha` must be 'smoothed' or 'fresh'. Found {refresh_alpha!r}.")
    if not 0 <= estimate_share <= 1:
        raise ValueError(f"`estimate_share` must be in [0, 1]. Found {estimate_share}.")
    if uniform_after_step is not None and uniform_after_step < 0:
        raise ValueError(f"`uniform_after_step` must be >= 0 or null. Found {uniform_after_step}.")


def check_names(found: Sequence[str], known: Sequence[str]) -> None:
    """Raise if there is no reward, or the names differ from those known from before (none known: anything goes).

    Raises:
        ValueError: names both.
    """
    if not found:
        raise ValueError("`rewards` must name at least one reward. Found none.")
    if known and tuple(found) != tuple(known):
        raise ValueError(
            f"`rewards` must stay the same and in the same order: {', '.join(known)}. Found {', '.join(found)}. "
            "Use the rewards the checkpoint was saved with, or start without it."
        )
