"""Checks of the options that all balancers share, and of the rewards' names."""

from collections.abc import Sequence


def check_options(
    refresh_every: int,
    ema_decay: float,
    amortize: str,
    refresh_alpha: str,
    estimate_share: float,
    uniform_after_step: int | None,
) -> None:
    """Check that every option of `Balancer` is in its range.

    Raises:
        ValueError: An option is out of its range.
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
