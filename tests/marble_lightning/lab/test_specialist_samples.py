"""Specialist samples: which they are, their order in a heat map, and what a sum leaves of them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from balancers import MARBLE, AdvantageSum, WeightedSum
from marble_lightning.lab.predictions import Predictions
from marble_lightning.lab.specialist_samples import dilution, heat_map_order, merged_advantages, specialist_rewards
from marble_lightning.nft.advantages import group_advantages

NAN = torch.nan
ADVANTAGES = torch.tensor([[0.1, 2.0], [1.5, 0.2], [3.0, NAN], [1.2, -1.2], [0.3, 0.1], [-1.1, 0.0]])


def test_specialist_samples_are_informative_for_one_reward_only():
    assert specialist_rewards(ADVANTAGES, 1.0).tolist() == [1, 0, 0, -1, -1, 0]
    assert specialist_rewards(ADVANTAGES, 4.0).tolist() == [-1] * 6
    assert specialist_rewards(ADVANTAGES, 0.05).tolist() == [-1, -1, 0, -1, -1, 0]


def test_heat_map_has_specialist_samples_first_by_reward_and_advantage():
    assert heat_map_order(ADVANTAGES, 1.0).tolist() == [2, 1, 5, 0, 3, 4]


def test_heat_map_order_is_a_permutation_also_without_any_score():
    assert sorted(heat_map_order(torch.full((4, 3), NAN), 1.0).tolist()) == [0, 1, 2, 3]


def test_merged_advantages_are_those_of_the_merged_reward():
    scores, groups = torch.rand(12, 2), torch.arange(3).repeat_interleave(4)
    merged = merged_advantages(WeightedSum(reduction="sum"), ("a", "b"), scores, groups)
    torch.testing.assert_close(merged, group_advantages(scores.sum(1, keepdim=True), groups)[:, 0])
    of_advantages = merged_advantages(AdvantageSum(), ("a", "b"), scores, groups)
    total = group_advantages(scores, groups).sum(1)
    torch.testing.assert_close(of_advantages, total / total.std(correction=0), atol=1e-3, rtol=1e-3)


def test_balancer_with_a_column_per_reward_is_refused():
    with pytest.raises(ValueError, match="into one. Found MARBLE, which keeps 2"):
        merged_advantages(MARBLE(), ("a", "b"), torch.rand(4, 2), torch.zeros(4, dtype=torch.long))


def test_dilution():
    merged = torch.tensor([0.5, -0.3, 1.5, 9.0, 9.0, -0.55])
    table = dilution(("a", "b"), ADVANTAGES, merged, 1.0)
    assert table["specialist samples"].tolist() == [3, 1]
    assert table["share of all"].tolist() == pytest.approx([1 / 2, 1 / 6])
    assert table["kept"].tolist() == pytest.approx([(-0.3 + 1.5 + 0.55) / (1.5 + 3.0 + 1.1), 0.25])
    assert table["opposed"].tolist() == pytest.approx([1 / 3, 0.0])
    own = dilution(("a", "b"), ADVANTAGES, ADVANTAGES[:, 0], 1.0)
    assert own["kept"]["a"] == pytest.approx(1.0)


def test_dilution_without_specialist_samples():
    table = dilution(("a", "b"), torch.zeros(3, 2), torch.zeros(3), 1.0)
    assert table["specialist samples"].tolist() == [0, 0]


@pytest.fixture
def predicted(tmp_path):
    """Two images of each of two prompts; the second reward applies to the second prompt only."""
    records = []
    for index, prompt in enumerate(["cat", "cat", "dog", "dog"]):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index:05d}.png")
        scores = {"a": index / 4} | ({"b": 1.0} if prompt == "dog" else {})
        records.append({"file": f"{index:05d}.png", "index": index, "prompt": prompt, "source": "x", "scores": scores})
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_predictions(predicted):
    predictions = Predictions(predicted)
    assert predictions.rewards == ["a", "b"]
    assert predictions.groups.tolist() == [0, 0, 1, 1]
    scores = torch.tensor([[0.0, NAN], [0.25, NAN], [0.5, 1.0], [0.75, 1.0]])
    torch.testing.assert_close(predictions.scores(), scores, equal_nan=True)
    torch.testing.assert_close(predictions.scores(["b"]), scores[:, 1:], equal_nan=True)
    assert predictions.image(3).size == (4, 4)


def test_folder_without_scored_images_is_refused(predicted, tmp_path):
    with pytest.raises(ValueError, match="must have images of `predict`"):
        Predictions(tmp_path / "nothing")
    (predicted / "images.jsonl").write_text(json.dumps({"file": "", "prompt": "", "source": "", "scores": {}}) + "\n")
    with pytest.raises(ValueError, match="must have scores"):
        Predictions(predicted)
