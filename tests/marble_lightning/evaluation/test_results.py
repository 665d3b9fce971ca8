"""Results as files, and runs side by side."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import pytest
import torch
from scipy.stats import zscore

from marble_lightning.evaluation.comparison import check_comparable, compared, scorer_differences, z_scores
from marble_lightning.evaluation.results import HeldOutScores, document, read, write
from marble_lightning.evaluation.tables import comparison_table
from rewards import JPEGCompressibility, Prompt, Reward
from tests.helpers.small_rewards import Brightness

NAN = math.nan


class Tagged(Brightness):
    """Tells prompts apart by their last word."""

    def tag(self, prompt: Prompt) -> str:
        return prompt.text.split()[-1]


JUDGES: dict[str, Reward] = {"ocr": Brightness(), "geneval": Tagged()}
PROMPTS = dict(
    enumerate([Prompt("one red", "a"), Prompt("two blue", "b"), Prompt("three red", "b"), Prompt("four red", "b")])
)
SCORES = torch.tensor([[1.0, 0.5], [NAN, 0.25], [3.0, 0.75], [NAN, NAN]])
SETTINGS = {"steps": 24, "seed": 0}


def results(scores: torch.Tensor = SCORES, base: torch.Tensor | None = None, **settings: Any) -> dict[str, Any]:
    return document(HeldOutScores(JUDGES, PROMPTS, scores, base).sampled(), judged={}, settings={**SETTINGS, **settings})


def test_means_by_set_and_over_all_by_tag_and_prompt():
    found = results(base=SCORES - torch.tensor([[0.5, 0.0], [0.0, 0.25], [1.5, 0.25], [0.0, 0.0]]))
    assert found["sets"]["a"]["ocr"] == {
        "mean": 1.0, "error": None, "n": 1,
        "base": {"mean": 0.5, "error": None, "n": 1}, "change": {"mean": 0.5, "error": None, "n": 1},
    }  # fmt: skip
    assert found["sets"]["b"]["geneval"]["mean"] == 0.5
    assert found["sets"]["b"]["geneval"]["error"] == pytest.approx(0.25)
    assert found["all"]["ocr"]["n"] == 2 and found["all"]["ocr"]["change"]["mean"] == 1.0
    assert found["tags"] == {
        "geneval": {
            "red": {"mean": 0.625, "error": pytest.approx(0.125), "n": 2},
            "blue": {"mean": 0.25, "error": None, "n": 1},
            "mean_of_tags": {"mean": 0.4375},
        },
    }
    assert [each["index"] for each in found["prompts"]] == [0, 1, 2]  # nothing is known of the last one
    assert found["prompts"][1] == {
        "index": 1, "set": "b", "prompt": "two blue", "scores": {"geneval": 0.25}, "base": {"geneval": 0.0}
    }  # fmt: skip


def test_files_hold_the_same_and_are_read_back(tmp_path):
    found = results(torch.tensor([[1.0, 0.5], [NAN, 0.25], [NAN, 0.75], [NAN, 0.0]]))
    write(tmp_path / "run", found)
    assert read(tmp_path / "run") == read(tmp_path / "run/results.json") == found
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
def test_what_is_no_results_file_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="Found no file .*results.json"):
        read(tmp_path)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"must be a results\.json.* Found .*results.json"):
        read(tmp_path)


def test_results_of_before_that_name_modules_are_comparable(tmp_path):
    reward_models: dict[str, Reward] = {"ocr": JPEGCompressibility(), "geneval": Tagged()}
    ours = document(HeldOutScores(reward_models, PROMPTS, SCORES, None).sampled(), judged={}, settings=SETTINGS)
    assert ours["judges"]["ocr"]["class"] == "rewards.JPEGCompressibility"
    write(tmp_path, ours)
    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace("rewards.JPEGCompressibility", "rewards.jpeg.JPEGCompressibility"))
    check_comparable(ours, read(file), "earlier", ["ocr"])
    assert scorer_differences(ours, read(file), ["ocr"]) == []


def test_the_composite_is_the_mean_of_z_scores():
    scores = [SCORES, SCORES + torch.tensor([0.5, -0.1]), SCORES * torch.tensor([2.0, 1.5])]
    runs = {str(index): results(each) for index, each in enumerate(scores)}
    means = torch.tensor([[run["all"][name]["mean"] for name in JUDGES] for run in runs.values()], dtype=torch.float64)
    found = compared(runs, list(JUDGES))
    expected = zscore(means.numpy(), axis=0).mean(1)
    assert [run["composite"] for run in found] == pytest.approx(expected.tolist())
    assert sum(expected) == pytest.approx(0)
    assert [run["means"]["ocr"] for run in found] == pytest.approx(means[:, 0].tolist())
    only = compared(runs, ["geneval"])
    assert [run["composite"] for run in only] == pytest.approx(zscore(means[:, 1].numpy()).tolist())
    assert comparison_table(found).row_count == 3


def test_rewards_on_which_runs_agree_do_not_count():
    means = torch.tensor([[1.0, 5.0], [3.0, 5.0 + 1e-6]], dtype=torch.float64)
    torch.testing.assert_close(z_scores(means)[:, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert z_scores(means)[:, 1].isnan().all()
    same = compared({"a": results(), "b": results()}, list(JUDGES))
    assert [run["composite"] for run in same] == [None, None]
    json.dumps(same, allow_nan=False)


OTHER_PROMPT = {**PROMPTS, 1: Prompt("two green", "b")}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (results(steps=40), "Found that one with steps 40 instead of 24;"),
        (results(steps=40, seed=3), "with steps 40 instead of 24, seed 3 instead of 0;"),
        (results(resolution=512), "with resolution 512 instead of None"),
        (results(SCORES.clone().fill_(1.0)), "with 4 prompts instead of 3"),
        (
            document(HeldOutScores(JUDGES, OTHER_PROMPT, SCORES).sampled(), settings=SETTINGS),
            "with prompt 1 'two green' of 'b' instead of prompt 1 'two blue' of 'b'",
        ),
        (
            document(HeldOutScores({"ocr": Brightness()}, PROMPTS, SCORES[:, 1:]).sampled(), settings=SETTINGS),
            "Found none of geneval in that one; name others under `results.columns`",
        ),
        (results(torch.where(torch.tensor([True, False]), torch.nan, SCORES)), "Found none of ocr in that one"),
    ],
)
def test_runs_measured_otherwise_are_refused_with_what_differs(other, message):
    with pytest.raises(ValueError) as error:
        check_comparable(results(), other, "that one", list(JUDGES))
    assert message in str(error.value) and "`results.compare_with`" in str(error.value)


def test_a_run_measured_the_same_way_is_comparable():
    check_comparable(results(), results(SCORES + 1), "that one", list(JUDGES))


def test_another_judge_under_the_same_name():
    """Another class is refused; other settings are told, since weights may have moved."""
    ours, theirs, kind = results(), results(), next(iter(JUDGES))
    theirs["judges"] = {**ours["judges"], kind: {**ours["judges"][kind], "class": "mine.Another"}}
    with pytest.raises(ValueError, match=rf"with {kind} by mine\.Another instead of tests"):
        check_comparable(ours, theirs, "that one", list(JUDGES))
    theirs["judges"][kind] = {**ours["judges"][kind], "path": "elsewhere"}
    check_comparable(ours, theirs, "that one", list(JUDGES))
    assert scorer_differences(ours, theirs, list(JUDGES)) == [f"{kind}.path elsewhere instead of None"]
    assert scorer_differences(ours, theirs, list(JUDGES)[1:]) == []
