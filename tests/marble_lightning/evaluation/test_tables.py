"""Means, standard errors and paired changes against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from marble_lightning.evaluation.statistics import changes, per_prompt, summaries, summarise
from marble_lightning.evaluation.tables import held_out_table, tags_table

NAN = torch.nan


def test_mean_and_standard_error_without_nan():
    summary = summarise(torch.tensor([1.0, NAN, 3.0, 5.0]))
    assert summary.mean == pytest.approx(3.0)
    assert summary.error == pytest.approx(2.0 / 3**0.5)  # deviation 2 over three values
    assert summary.n == 3


def test_changes_are_paired():
    base = torch.tensor([[0.0], [10.0], [NAN]])
    (change,) = changes(base, base + torch.tensor([[1.0], [2.0], [1.0]]))
    assert change.mean == pytest.approx(1.5)
    assert change.error == pytest.approx(0.5)  # deviation 0.707 over two, independent of the spread over prompts
    assert change.n == 2


def test_images_of_a_prompt_are_averaged_in_any_order():
    rows = torch.tensor([[3.0, 8.0], [0.0, 1.0], [2.0, 4.0], [1.0, NAN]])
    torch.testing.assert_close(per_prompt(rows, 2, 2), torch.tensor([[1.0], [6.0]]))


def test_prompts_without_an_image_are_nan_and_no_image_counts_twice():
    means = per_prompt(torch.tensor([[2.0, 5.0]]), 3, 1)
    torch.testing.assert_close(means, torch.tensor([[NAN], [NAN], [5.0]]), equal_nan=True)
    with pytest.raises(ValueError, match="scored once. Found 1 more than once"):
        per_prompt(torch.tensor([[1.0, 5.0], [0.0, 4.0], [1.0, 5.0]]), 2, 1)


def test_the_mean_of_the_base_is_over_prompts_with_both_scores():
    scores, base = torch.tensor([[1.0], [2.0], [NAN]]), torch.tensor([[0.5], [NAN], [9.0]])
    columns = summaries(scores, base)
    assert [columns[name][0][::2] for name in ("base", "trained", "change")] == [(0.5, 1), (1.5, 2), (0.5, 1)]
    console = Console(width=110, record=True)
    console.print(held_out_table(["ocr"], scores, base=base))
    assert "2 (1 with base)" in console.export_text()


def test_table_without_and_with_a_base():
    console = Console(width=110, record=True)
    scores = torch.tensor([[0.5], [0.7]])
    console.print(held_out_table(["ocr"], scores, heading="base"))
    console.print(held_out_table(["ocr"], scores, base=scores - 0.1))
    shown = console.export_text()
    assert "0.6000 ± 0.1000" in shown
    assert "+0.1000 ± 0.0000" in shown


def test_rows_are_tags_and_columns_are_reward_models():
    console = Console(width=110, record=True)
    scores = {
        "geneval/counting": torch.tensor([0.5, NAN, 0.7]), "geneval/mean_of_tags": torch.tensor([0.55]),
        "geneval/colors": torch.tensor([NAN, 0.5, NAN]), "strict/counting": torch.tensor([1.0, NAN, 0.0]),
    }  # fmt: skip
    console.print(tags_table(scores, base={name: column - 0.1 for name, column in scores.items()}))
    rows = [line.strip("│").split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["colors", "0.4000 -> 0.5000", ""],
        ["counting", "0.5000 -> 0.6000", "0.4000 -> 0.5000"],
        ["mean_of_tags", "0.4500 -> 0.5500", ""],
    ]
