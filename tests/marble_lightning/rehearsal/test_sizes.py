"""The smallest round that a rehearsal can make of a run's."""

from __future__ import annotations

import pytest

from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.rehearsal.sizes import smallest_round
from marble_lightning.tinyworld import PROMPTS


@pytest.mark.parametrize(
    ("configured", "ranks", "multiple", "least", "expected"),
    [
        ((48, 24), 16, 9, 9, (48, 3)),  # sd35m
        ((12, 12), 1, 9, 9, (3, 3)),  # sd35m_1gpu
        ((9, 12), 1, 36, 54, (9, 8)),  # tiny: of 3 x 24, 6 x 12 and 9 x 8 the one with the most prompts
        ((9, 12), 1, 36, 108, (9, 12)),  # nothing smaller
        ((6, 4), 2, 1, 1, (6, 2)),  # never less than two images of a prompt
    ],
)
def test_the_smallest_round(configured, ranks, multiple, least, expected):
    prompts, images = configured
    sources = ["pickscore", "ocr", "geneval"]
    data = PromptDataModule(str(PROMPTS), sources, prompts_per_round=prompts, images_per_prompt=images)
    assert smallest_round(data, ranks, multiple, least) == expected
