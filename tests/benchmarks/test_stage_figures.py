"""Spreads, correlations and transfer of made-up scores with known values."""

from __future__ import annotations

import pytest
import torch

from benchmarks.stage_figures import (
    base_figures,
    relative_transfer,
    trade_offs,
    transfer_matrix,
    within_prompt_correlations,
    within_prompt_spread,
)
from benchmarks.stage_tables import base_table, correlations_table, trade_offs_text, transfer_table, write_heat_map
from marble_lightning.evaluation.statistics import Summary, crossed_summary


@pytest.fixture(name="scores")
def _scores():
    """Scores (prompt, image, reward): noise, its opposite plus other noise, and one that half of the prompts have."""
    draws = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 400, 8, generator=draws).double()
    of_prompts = 10 * torch.randn(400, 1, generator=draws)
    third = torch.where((torch.arange(400) < 200)[:, None], noise, torch.nan)
    return torch.stack([0.5 * noise + of_prompts, other - noise - of_prompts, third], dim=2)


def test_spread_ignores_the_differences_between_prompts(scores):
    torch.testing.assert_close(within_prompt_spread(scores), torch.tensor([0.5, 2**0.5, 1.0]).double(), rtol=0.05, atol=0)
    assert within_prompt_spread(torch.full((3, 2, 1), torch.nan)).isnan().all()


def test_correlations_are_those_within_prompts(scores):
    expected = torch.tensor([[1, -(0.5**0.5), 1], [-(0.5**0.5), 1, -(0.5**0.5)], [1, -(0.5**0.5), 1]])
    torch.testing.assert_close(within_prompt_correlations(scores), expected.double(), rtol=0, atol=0.06)
    whole = scores[:200]
    centred = (whole - whole.mean(1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(within_prompt_correlations(whole), centred.T.corrcoef(), rtol=0, atol=1e-9)


def test_correlations_without_common_prompts_or_variation_are_nan():
    scores = torch.rand(4, 3, 3)
    scores[:2, :, 0], scores[2:, :, 1], scores[:, :, 2] = torch.nan, torch.nan, 1.0
    correlations = within_prompt_correlations(scores)
    assert correlations.isnan().tolist() == [[False, True, True], [True, False, True], [True, True, True]]


def test_a_change_has_the_error_over_seeds_and_prompts():
    rows = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 1.0]])
    assert crossed_summary(rows).mean == 2.5
    assert crossed_summary(rows).error == pytest.approx((2 / 2 + 0.5 / 2) ** 0.5)
    assert crossed_summary(rows[:1]) == Summary(1.5, 0.5, 2)
    assert crossed_summary(rows[:1]).errors == 3


MATRIX = [
    [Summary(2.0, 0.1, 2), Summary(-0.5, 0.1, 2), Summary(0.2, 0.1, 2)],
    [Summary(-1.0, 0.5, 2), Summary(1.0, 0.1, 2), Summary(-0.4, 0.1, 2)],
    [Summary(0.0, 0.1, 2), Summary(0.0, 0.1, 2), Summary(0.1, 0.1, 2)],
]
NAMES = ["a", "b", "c"]


def test_transfer_is_by_trained_and_measured_reward():
    runs = [torch.full((2, 4, 2), 1.0), torch.tensor([2.0, 3.0]).expand(2, 4, 2)]
    assert [[cell.mean for cell in row] for row in transfer_matrix(runs)] == [[1, 1], [2, 3]]


def test_relative_transfer_is_one_on_the_diagonal_where_it_is_defined():
    shares = relative_transfer(MATRIX)
    torch.testing.assert_close(shares[:, :2], torch.tensor([[1, -0.5], [-0.5, 1], [0, 0]]).double())
    assert shares[:, 2].isnan().all()


def test_trade_offs_are_significant_falls_between_two_rewards_of_the_stage():
    assert trade_offs(MATRIX, NAMES, NAMES) == [("a", "b"), ("b", "c")]
    assert trade_offs(MATRIX, NAMES, ["a", "b"]) == [("a", "b")]
    assert trade_offs_text(MATRIX, NAMES, {"one": NAMES, "two": ["a", "c"]}) == (
        "- one, trade-offs: a costs b, b costs c\n- two, trade-offs: none"
    )


def records(scores):
    return [
        {"prompt": f"prompt {index // 2}", "scores": {name: score for name, score in row.items() if score is not None}}
        for index, row in enumerate(scores)
    ]


def test_base_figures_and_their_tables():
    base = base_figures(records([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}, {"a": 2.0}, {"a": 2.0}]), 2, ["a", "b", "c"])
    assert base["mean"] == [2.0, 3.0, None]
    assert base["prompts"] == [2, 1, 0]
    assert base["error"] == [0.0, None, None]
    assert base["spread"] == [1.0, round(2**0.5, 5), None]
    assert base["correlations"][0][:2] == [1.0, 1.0]
    assert "| a | 2 | 2.0000 ± 0.0000 | 1.0000 | one |" in base_table(base, {"one": ["a"]})
    assert "| c | 0 | - ± - | - | metric only |" in base_table(base, {"one": ["a"]})
    assert "| a |  | +1.00 | - |" in correlations_table(base)


def test_base_figures_need_whole_prompts():
    with pytest.raises(ValueError, match="There must be 2 images of each prompt"):
        base_figures(records([{"a": 1.0}] * 3), 2, ["a"])
    with pytest.raises(ValueError, match="There must be 4 images of each prompt"):
        base_figures(records([{"a": 1.0}] * 4), 4, ["a"])


def test_the_transfer_table_marks_significant_falls():
    text = transfer_table(MATRIX, NAMES, NAMES)
    assert "| a | +2.0000 ± 0.1000 | **-0.5000 ± 0.1000** | +0.2000 ± 0.1000 |" in text
    assert "| b | -1.0000 ± 0.5000 |" in text


def test_the_heat_map_is_written(tmp_path):
    write_heat_map(MATRIX, NAMES, tmp_path / "folder" / "map.png")
    assert (tmp_path / "folder" / "map.png").stat().st_size > 1000
