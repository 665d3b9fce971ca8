"""GenEval's rules case by case, each expectation derived by hand."""

from dataclasses import replace

import pytest
import torch

from rewards import Detection
from rewards.geneval.rules import Verdict, evaluate, keep, relations
from tests.helpers.geneval_cases import BOTTOM, CASES, LEFT, MIDDLE, RIGHT, TOP, TWO_RED_CATS, colours, see, want


@pytest.mark.parametrize("name", CASES)
def test_rules(name: str) -> None:
    tag, include, exclude, detections, *expected = CASES[name]
    verdict = evaluate({"tag": tag, "include": include, "exclude": exclude}, detections, colours)
    assert [verdict.correct, verdict.strict] == expected[:2]
    assert verdict.partial == pytest.approx(expected[2])


@pytest.mark.parametrize("name", CASES)
def test_full_partial_score_is_strictness(name: str) -> None:
    tag, include, exclude, detections, *_ = CASES[name]
    verdict = evaluate({"tag": tag, "include": include, "exclude": exclude}, detections[::-1], colours)
    assert verdict.strict == (verdict.partial == 1)


PLACES = {"left of": LEFT, "right of": RIGHT, "above": TOP, "below": BOTTOM}


def ideal(metadata: dict) -> list[Detection]:
    """Detections that meet a published prompt: its targets in the middle, what is placed relative to them around it."""
    return [
        see(clause["class"], 0.95, PLACES[clause["position"][0]] if "position" in clause else MIDDLE, clause.get("color"))
        for clause in metadata["include"]
        for _ in range(clause["count"])
    ]


def test_published_prompts_are_met_by_what_they_ask_for(published_metadata: list[dict]) -> None:
    assert len(published_metadata) == 300
    assert {line["tag"] for line in published_metadata} == {
        "single_object", "two_object", "counting", "colors", "color_attr", "position"
    }  # fmt: skip
    for line in published_metadata:
        assert evaluate(line, ideal(line), colours) == Verdict(correct=True, strict=True, partial=1.0), line["prompt"]


def test_published_prompts_notice_what_is_wrong(published_metadata: list[dict]) -> None:
    broken = dict.fromkeys(("missing", "colour", "place", "surplus"), 0)

    def refused(kind: str, line: dict, detections: list[Detection]) -> None:
        verdict = evaluate(line, detections, colours)
        assert not verdict.correct and not verdict.strict and verdict.partial < 1, (kind, line["prompt"])
        broken[kind] += 1

    for line in published_metadata:
        met = ideal(line)
        for index in range(len(met)):
            refused("missing", line, met[:index] + met[index + 1 :])
            if met[index].colour is not None:
                other = replace(met[index], colour="red" if met[index].colour != "red" else "green")
                refused("colour", line, [*met[:index], other, *met[index + 1 :]])
        if line["tag"] == "position":
            target, placed = met
            refused("place", line, [replace(target, box=placed.box), replace(placed, box=target.box)])
        if line["tag"] == "counting":
            refused("surplus", line, [*met, met[0]])
    assert broken == {
        "missing": sum(len(ideal(line)) for line in published_metadata),
        "colour": 164,
        "place": 56,
        "surplus": 50,
    }


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (TOP, BOTTOM, {"above"}),
        (BOTTOM, TOP, {"below"}),
        (MIDDLE, MIDDLE, set()),
        # Centres 4 apart, margin 0.1 * (20 + 20) = 4: nothing is left.
        ((44, 40, 64, 60), MIDDLE, set()),
        # 8 apart, 4 left: 4 / 8 = 0.5 is not more than half. 9 apart, 5 left: 5 / 9 is.
        ((48, 40, 68, 60), MIDDLE, set()),
        ((49, 40, 69, 60), MIDDLE, {"right of"}),
        # 40 and 40 apart, 36 left each: 36 / 56.6 = 0.64 on both axes.
        ((80, 80, 100, 100), MIDDLE, {"right of", "below"}),
        # 40 right and 20 up: 36 / 44.7 = 0.80 and 16 / 44.7 = 0.36.
        ((80, 20, 100, 40), MIDDLE, {"right of"}),
        # Sizes count per axis: a wide box needs more room in x. 20 apart, margin 0.1 * (100 + 20) = 12, 8 / 20 = 0.4.
        ((20, 40, 120, 60), MIDDLE, set()),
    ],
)
def test_relations(box: tuple, other: tuple, expected: set) -> None:
    assert relations(box, other) == expected


def test_relations_are_antisymmetric() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    generator = torch.Generator().manual_seed(3)
    named = 0
    for _ in range(200):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values.flatten(1).tolist()
        one, two = tuple(corners[0]), tuple(corners[1])
        assert relations(two, one) == {opposite[name] for name in relations(one, two)}
        named += len(relations(one, two))
    assert named > 50


def test_keep_sorts_and_drops() -> None:
    candidates = [see("cat", 0.4), see("dog", 0.9), see("cat", 0.8), see("cat", 0.2)]
    kept = keep(candidates, 0.3, max_objects=1)
    assert {label: [d.score for d in group] for label, group in kept.items()} == {"cat": [0.8], "dog": [0.9]}


def test_colours_are_asked_only_of_enough_objects() -> None:
    def never(detections):
        raise AssertionError("asked for a colour")

    evaluate({"include": TWO_RED_CATS}, [see("cat")], never)  # one cat is not enough
    evaluate({"include": [want("cat")]}, [see("cat")], never)  # no colour asked


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "at least one object under `include`"),
        ({"include": []}, "at least one object under `include`"),
        ({"include": [want("cat", 0)]}, "a `count` >= 1. Found"),
        ({"include": [{"count": 1}]}, "must have a `class`"),
        ({"include": [want("cat")], "exclude": [want("cat", 0)]}, "a `count` >= 1. Found"),
        ({"include": [want("cat", "2")]}, "a `count` >= 1. Found"),
        ({"include": ["cat"]}, "each clause must have a `class` and a `count` >= 1. Found 'cat'"),
        ({"include": "cat"}, "`include` must be a list of clauses. Found 'cat'"),
        ({"include": [want("cat")], "exclude": None}, "`exclude` must be a list of clauses. Found None"),
        ({"include": [want("cat", color=["red"])]}, r"`color` must be the name of a colour. Found \['red'\]"),
        ({"include": [want("cat"), want("dog", position=["near", 0])]}, "a pair of one of left of, .*Found .'near', 0."),
        ({"include": [want("cat"), want("dog", position="above")]}, "a pair of one of left of, .*Found 'above'"),
        ({"include": [want("cat", position=["above", 0])]}, "must refer to an earlier clause"),
        ({"include": [want("cat"), want("dog", position=["above", -1])]}, "must refer to an earlier clause"),
    ],
)
def test_malformed_metadata_is_refused(metadata: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(metadata, [], colours)
