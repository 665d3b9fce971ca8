"""Result files, and comparison of runs."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import pytest
import torch
from scipy.stats import zscore

from marble_lightning.evaluation.comparison import check_comparable, compare_runs, scorer_differences, z_scores
from marble_lightning.evaluation.results import HeldOutScores, document, read, write
from marble_lightning.evaluation.tables import comparison_table
from rewards import Prompt, Reward
from tests.helpers.small_rewards import Brightness

NAN = math.nan


class Tagged(Brightness):
    """Its tag is the last word of the prompt."""

    def tag(self, prompt: Prompt) -> str:
        return prompt.text.split()[-1]


REWARD_MODELS: dict[str, Reward] = {"ocr": Brightness(), "geneval": Tagged()}
PROMPTS = dict(
    enumerate([Prompt("one red", "a"), Prompt("two blue", "b"), Prompt("three red", "b"), Prompt("four red", "b")])
)
SCORES = torch.tensor([[1.0, 0.5], [NAN, 0.25], [3.0, 0.75], [NAN, NAN]])
SETTINGS = {"steps": 24, "seed": 0}


def results(scores: torch.Tensor = SCORES, base: torch.Tensor | None = None, **settings: Any) -> dict[str, Any]:
    return document(HeldOutScores(REWARD_MODELS, PROMPTS, scores, base), evaluated={}, settings={**SETTINGS, **settings})


def test_means_by_set_and_tag_and_scores_by_prompt():
    content = results(base=SCORES - torch.tensor([[0.5, 0.0], [0.0, 0.25], [1.5, 0.25], [0.0, 0.0]]))
    assert content["sets"]["a"]["ocr"] == {
        "mean": 1.0, "error": None, "n": 1,
        "base": {"mean": 0.5, "error": None, "n": 1}, "change": {"mean": 0.5, "error": None, "n": 1},
    }  # fmt: skip
    assert content["sets"]["b"]["geneval"]["mean"] == 0.5
    assert content["sets"]["b"]["geneval"]["error"] == pytest.approx(0.25)
    assert content["all"]["ocr"]["n"] == 2 and content["all"]["ocr"]["change"]["mean"] == 1.0
    assert content["tags"] == {
        "geneval": {
            "red": {"mean": 0.625, "error": pytest.approx(0.125), "n": 2},
            "blue": {"mean": 0.25, "error": None, "n": 1},
            "mean_of_tags": {"mean": 0.4375},
        },
    }
    assert [prompt["index"] for prompt in content["prompts"]] == [0, 1, 2, 3]  # the last one has no score
    assert content["prompts"][1] == {
        "index": 1, "set": "b", "prompt": "two blue", "scores": {"geneval": 0.25}, "base": {"geneval": 0.0}
    }  # fmt: skip


def test_files_are_read_back(tmp_path):
    content = results(torch.tensor([[1.0, 0.5], [NAN, 0.25], [NAN, 0.75], [NAN, 0.0]]))
    write(tmp_path / "run", content)
    assert read(tmp_path / "run") == read(tmp_path / "run/results.json") == content
    with (tmp_path / "run/results.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[:4] == [
        ["set", "reward", "mean", "error", "n"],
        ["a", "ocr", "1.0", "", "1"],
        ["a", "geneval", "0.5", "", "1"],
        ["b", "ocr", "", "", "0"],
    ]
    assert [row[0] for row in rows[4:]] == ["b", "all", "all"]


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"settings": {}}'])
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="Found no file .*results.json"):
        read(tmp_path)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"must be a results\.json.* Found .*results.json"):
        read(tmp_path)


def test_the_composite_is_the_mean_of_z_scores():
    scores = [SCORES, SCORES + torch.tensor([0.5, -0.1]), SCORES * torch.tensor([2.0, 1.5])]
    runs = {str(index): results(of_run) for index, of_run in enumerate(scores)}
    means = torch.tensor(
        [[run["all"][name]["mean"] for name in REWARD_MODELS] for run in runs.values()], dtype=torch.float64
    )
    comparison = compare_runs(runs, list(REWARD_MODELS))
    expected = zscore(means.numpy(), axis=0).mean(1)
    assert [run["composite"] for run in comparison] == pytest.approx(expected.tolist())
    assert sum(expected) == pytest.approx(0)
    assert [run["means"]["ocr"] for run in comparison] == pytest.approx(means[:, 0].tolist())
    one_column = compare_runs(runs, ["geneval"])
    assert [run["composite"] for run in one_column] == pytest.approx(zscore(means[:, 1].numpy()).tolist())
    assert comparison_table(comparison).row_count == 3


def test_rewards_with_equal_means_do_not_count():
    means = torch.tensor([[1.0, 5.0], [3.0, 5.0 + 1e-6]], dtype=torch.float64)
    torch.testing.assert_close(z_scores(means)[:, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert z_scores(means)[:, 1].isnan().all()
    same = compare_runs({"a": results(), "b": results()}, list(REWARD_MODELS))
    assert [run["composite"] for run in same] == [None, None]
    json.dumps(same, allow_nan=False)


FEWER_PROMPTS = {index: PROMPTS[index] for index in range(3)}
OTHER_PROMPT = {**PROMPTS, 1: Prompt("two green", "b")}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (results(steps=40), "Found that one with steps 40 instead of 24;"),
        (results(steps=40, seed=3), "with steps 40 instead of 24, seed 3 instead of 0;"),
        (results(resolution=512), "with resolution 512 instead of None"),
        (
            document(HeldOutScores(REWARD_MODELS, FEWER_PROMPTS, SCORES[:3]), settings=SETTINGS),
            "with 3 prompts instead of 4",
        ),
        (
            document(HeldOutScores(REWARD_MODELS, OTHER_PROMPT, SCORES), settings=SETTINGS),
            "with prompt 1 'two green' of 'b' instead of prompt 1 'two blue' of 'b'",
        ),
        (
            document(HeldOutScores({"ocr": Brightness()}, PROMPTS, SCORES[:, 1:]), settings=SETTINGS),
            "Found none of geneval in that one; name others under `results.columns`",
        ),
        (results(torch.where(torch.tensor([True, False]), torch.nan, SCORES)), "Found none of ocr in that one"),
    ],
)
def test_runs_with_other_settings_are_refused(other, message):
    with pytest.raises(ValueError) as error:
        check_comparable(results(), other, "that one", list(REWARD_MODELS))
    assert message in str(error.value) and "`results.compare_with`" in str(error.value)


def test_runs_with_the_same_settings_are_comparable():
    check_comparable(results(), results(SCORES + 1), "that one", list(REWARD_MODELS))


def test_another_reward_model_under_the_same_name():
    """Another class is refused. Other settings are reported, since only the path of the weights may differ."""
    this, other, name = results(), results(), next(iter(REWARD_MODELS))
    other["reward_models"] = {**this["reward_models"], name: {**this["reward_models"][name], "class": "mine.Another"}}
    with pytest.raises(ValueError, match=rf"with {name} by mine\.Another instead of tests"):
        check_comparable(this, other, "that one", list(REWARD_MODELS))
    other["reward_models"][name] = {**this["reward_models"][name], "path": "elsewhere"}
    check_comparable(this, other, "that one", list(REWARD_MODELS))
    assert scorer_differences(this, other, list(REWARD_MODELS)) == [f"{name}.path elsewhere instead of None"]
    assert scorer_differences(this, other, list(REWARD_MODELS)[1:]) == []


def test_runs_with_a_reward_for_some_prompts_have_the_same_prompts():
    """A run on this reward alone has no score of the others; its means and sets leave them out."""
    alone = HeldOutScores({"geneval": Tagged()}, PROMPTS, torch.tensor([[NAN], [0.25], [0.75], [NAN]]))
    content = document(alone, evaluated={}, settings=SETTINGS)
    assert list(content["sets"]) == ["b"] and content["all"]["geneval"]["n"] == 2
    assert [prompt["scores"] for prompt in content["prompts"]] == [{}, {"geneval": 0.25}, {"geneval": 0.75}, {}]
    check_comparable(content, results(), "that one", ["geneval"])
