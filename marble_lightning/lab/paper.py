"""Published figures of MARBLE on Stable Diffusion 3.5 Medium, to set beside those of other runs. None is measured here.

Source: MARBLE, arXiv 2605.06507, main table, ablations and gradient harmony table.
"""

from __future__ import annotations

from collections.abc import Mapping

REFERENCE = "marble_paper"
"""The variant that the ablations are compared with: `balancers/marble_paper`, the published settings."""

FAILS = float("-inf")
"""Score of a run that fails, below all others."""


def _row(*scores: float) -> dict[str, float]:
    return dict(zip(("geneval", "ocr", "pickscore", "clipscore", "hpsv2"), scores, strict=False))


ABLATIONS: Mapping[str, Mapping[str, float]] = {
    REFERENCE: _row(0.94, 0.96, 22.83, 0.286, 0.355),
    "no_normalisation": _row(FAILS, FAILS, FAILS, FAILS, FAILS),
    "fixed_alpha": _row(0.86, 0.89, 22.64, 0.272, 0.346),
    "every_1": _row(0.92, 0.92, 21.32, 0.267, 0.301),
    "every_5": _row(0.92, 0.96),
    "every_20": _row(0.92, 0.93),
    "rho_0.1": _row(0.86, 0.80),
    "rho_0.3": _row(0.88, 0.84),
    "rho_0.5": _row(0.93, 0.95),
    "rho_0.9": _row(0.90, 0.89),
    "weights": _row(0.90, 0.92),
    "dropout": _row(0.80, 0.61),
}
"""Published scores by variant and reward. PickScore is undivided; `rewards.PickScore` divides by 26."""

HARMONY: Mapping[str, Mapping[str, float]] = {
    "MARBLE": {"worst": 0.3721, "mean": 0.4014, "variance": 0.0058, "conflicts": 0.0},
    "weighted sum": {"worst": -0.1346, "mean": 0.4559, "variance": 0.1605, "conflicts": 0.8},
}
"""Published cosines of an update with each reward's gradient: least, mean and variance, and how often the least is < 0."""
