"""Names in the folders of runs that several parts share. Nothing slow is imported for them."""

from __future__ import annotations

CONFIG = "config.yaml"
"""A run's configuration."""
RESULTS = "results.json"
"""Its held-out results."""
SWEEP = "sweep.yaml"
"""The settings of a sweep, in its folder."""
ALL = "all"
"""What results call all prompt sets together."""
