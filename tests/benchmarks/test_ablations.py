"""The table of ablations beside the paper's, from made-up results."""

from __future__ import annotations

import pytest

from benchmarks.ablations import paper_table, run_of, settings_of
from benchmarks.stages import read_stages
from marble_lightning.lab.paper import REFERENCE


def runs(ocr, geneval):
    """Two seeds of a variant with these changes on four prompts."""
    figures = {"rewards": ["ocr", "geneval"], "base": [[0.0, 0.0]] * 4, "trained": [[ocr, geneval]] * 4}
    return {0: figures, 1: figures}


def test_differences_are_those_to_the_reference():
    results = {REFERENCE: runs(0.2, 0.2), "rho_0.1": runs(0.5, 0.1), "share_1": runs(0.1, 0.1)}
    lines = paper_table(results, ["ocr", "geneval"]).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| rho_0.1", "geneval", "-0.1000 [-0.1000, -0.1000]"],
        ["| rho_0.1", "ocr", "+0.3000 [+0.3000, +0.3000]"],
    ]
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["yes |", "no |"]


@pytest.mark.slow
def test_every_variant_is_another_configuration_of_fit():
    stages, names = read_stages(), settings_of(24)
    found = {run_of(stages, "published", name, 0, 24).identity["fingerprint"]["configuration"] for name in names}
    assert len(found) == len(names)
