"""GenEval 2's questions, and the probability of a correct answer."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rewards.remote.soft_tifa import answer_probability, read_questions, spellings

COUNT, RED = ["How many cows are in the image?", "three"], ["Are the cows red?", "Yes"]


def logs(**probabilities: float) -> list[tuple[str, float]]:
    return [(token.replace("_", " "), math.log(value)) for token, value in probabilities.items()]


def test_questions_of_a_line_in_the_benchmarks_format() -> None:
    line = '{"prompt": "four glass lamps", "atom_count": 3, "vqa_list": [["How many lamps are in the image?", "four"], '
    line += '["Are the lamps glass?", "Yes"], ["Are there any lamps in the image?", "Yes"]], "skills": []}'
    questions = read_questions(json.loads(line))
    assert [answer for _, answer in questions] == ["four", "Yes", "Yes"]
    assert questions[1][0] == "Are the lamps glass?"


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        (None, "None"),
        ([], r"\[\]"),
        ("Are the cows red?", "'Are the cows red"),
        ([COUNT, ["Are the cows red?"]], r"\['Are the cows red\?'\]"),
        ([COUNT, "Are the cows red?"], "'Are the cows red"),
        ([["Are the cows red?", "No"]], "'No'"),
        ([["Are the cows red?", True]], "True"),
        ([["How many cows are in the image?", "Yes"]], "'Yes'"),
        ([["How many cows are in the image?", "eleven"]], "'eleven'"),
        ([["How many cows are in the image?", 3]], "3"),
    ],
)
def test_malformed_questions_are_refused(pairs: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"^GenEval2: .*`vqa_list` must be .*Found .*{found}"):
        read_questions({"vqa_list": pairs})


def test_spellings_are_the_published_ones() -> None:
    assert spellings("Yes") == {"Yes", "yes", " yes", " Yes"}
    assert spellings("three") == {"three", "Three", " three", " Three", "3", " 3"}
    assert spellings("ten") >= {"10", " 10"}


@pytest.mark.parametrize(
    ("answer", "tokens", "probability"),
    [
        ("Yes", logs(Yes=0.5, yes=0.2, _Yes=0.1, No=0.1, Y=0.05), 0.8),
        ("three", logs(Three=0.3, three=0.2, Four=0.2, **{"3": 0.1, "_3": 0.1}), 0.7),
        ("Yes", logs(No=0.9, no=0.06), 0.06),  # not listed: at most the last one
        ("three", logs(Zero=0.9, There=0.02), 0.02),
        ("three", logs(There=0.9, No=0.02), 0.02),
        ("Yes", logs(There=0.9, I=0.1), math.nan),  # neither yes nor no
        ("three", logs(Yes=0.9, The=0.1), math.nan),  # no number
        ("Yes", [("Yes", -9999.0), ("No", 0.0)], 0.0),
        ("Yes", [], math.nan),
    ],
)
def test_probability_of_the_correct_answer(answer: str, tokens: list[tuple[str, float]], probability: float) -> None:
    assert answer_probability(answer, tokens) == pytest.approx(probability, nan_ok=True)
