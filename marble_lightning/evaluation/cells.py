"""Figures as texts for the cells of tables, in Markdown and on reports."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from marble_lightning.evaluation.statistics import Interval, Summary, mean_or_interval


def of_interval(interval: Interval, digits: int = 4) -> str:
    """A mean with the ends of its interval."""
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def of_summary(summary: Summary, digits: int = 4) -> str:
    """A mean with its standard error, without the latter if there is none; a dash for the mean of nothing."""
    if not summary.n:
        return "-"
    return f"{summary.mean:+.{digits}f}" + (f" ± {summary.error:.{digits}f}" if summary.error == summary.error else "")


def of_changes(changes: Float[Tensor, "seed prompt"], level: float = 0.95) -> str:
    """A mean change with its interval; of a single seed with its standard error, of a single prompt alone."""
    found = mean_or_interval(changes, level)
    return of_interval(found) if isinstance(found, Interval) else of_summary(found)


def of_p_value(p_value: float) -> str:
    """A p-value with three digits."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
