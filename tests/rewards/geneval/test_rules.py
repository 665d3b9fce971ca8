"""GenEval's rules case by case, with expectations derived by hand."""

from dataclasses import replace

import pytest
import torch

from rewards import Detection
from rewards.geneval.rules import Verdict, evaluate, keep, relations
from tests.helpers.geneval_cases import BOTTOM, CASES, LEFT, MIDDLE, RIGHT, TOP, TWO_RED_CATS, clause_of, colours, det


@pytest.mark.parametrize("name", CASES)
def test_rules(name: str) -> None:
    tag, include, exclude, detections, *expected = CASES[name]
    verdict = evaluate({"tag": tag, "include": include, "exclude": exclude}, detections, colours)
    assert [verdict.correct, verdict.strict] == expected[:2]
    assert verdict.partial == pytest.approx(expected[2])


@pytest.mark.parametrize("name", CASES)
def test_strict_is_a_partial_score_of_one(name: str) -> None:
    tag, include, exclude, detections, *_ = CASES[name]
    verdict = evaluate({"tag": tag, "include": include, "exclude": exclude}, detections[::-1], colours)
    assert verdict.strict == (verdict.partial == 1)


POSITIONS = {"left of": LEFT, "right of": RIGHT, "above": TOP, "below": BOTTOM}


def ideal(metadata: dict) -> list[Detection]:
    """Return detections that meet a published prompt: targets in the middle, objects with a position around them."""
    return [
        det(clause["class"], 0.95, POSITIONS[clause["position"][0]] if "position" in clause else MIDDLE, clause.get("color"))
        for clause in metadata["include"]
        for _ in range(clause["count"])
    ]


def test_ideal_detections_meet_the_published_prompts(published_metadata: list[dict]) -> None:
    assert len(published_metadata) == 300
    assert {line["tag"] for line in published_metadata} == {
        "single_object", "two_object", "counting", "colors", "color_attr", "position"
    }  # fmt: skip
    for line in published_metadata:
        assert evaluate(line, ideal(line), colours) == Verdict(correct=True, strict=True, partial=1.0), line["prompt"]


def test_wrong_detections_fail_the_published_prompts(published_metadata: list[dict]) -> None:
    failures = dict.fromkeys(("missing", "colour", "position", "surplus"), 0)

    def refused(kind: str, line: dict, detections: list[Detection]) -> None:
        verdict = evaluate(line, detections, colours)
        assert not verdict.correct and not verdict.strict and verdict.partial < 1, (kind, line["prompt"])
        failures[kind] += 1

    for line in published_metadata:
        objects = ideal(line)
        for index in range(len(objects)):
            refused("missing", line, objects[:index] + objects[index + 1 :])
            if objects[index].colour is not None:
                recoloured = replace(objects[index], colour="red" if objects[index].colour != "red" else "green")
                refused("colour", line, [*objects[:index], recoloured, *objects[index + 1 :]])
        if line["tag"] == "position":
            target, placed = objects
            refused("position", line, [replace(target, box=placed.box), replace(placed, box=target.box)])
        if line["tag"] == "counting":
            refused("surplus", line, [*objects, objects[0]])
    assert failures == {
        "missing": sum(len(ideal(line)) for line in published_metadata),
        "colour": 164,
        "position": 56,
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
        # Centres 4 apart, margin 0.1 * (20 + 20) = 4: kept 0.
        ((44, 40, 64, 60), MIDDLE, set()),
        # 8 apart, kept 4: 4 / 8 = 0.5 is not more than half. 9 apart, kept 5: 5 / 9 is.
        ((48, 40, 68, 60), MIDDLE, set()),
        ((49, 40, 69, 60), MIDDLE, {"right of"}),
        # 40 and 40 apart, kept 36 each: 36 / 56.6 = 0.64 on both axes.
        ((80, 80, 100, 100), MIDDLE, {"right of", "below"}),
        # 40 right and 20 up: 36 / 44.7 = 0.80 and 16 / 44.7 = 0.36.
        ((80, 20, 100, 40), MIDDLE, {"right of"}),
        # Sizes count per axis: a wide box has a larger margin in x. 20 apart, margin 0.1 * (100 + 20) = 12, 8 / 20 = 0.4.
        ((20, 40, 120, 60), MIDDLE, set()),
    ],
)
def test_relations(box: tuple, other: tuple, expected: set) -> None:
    assert relations(box, other) == expected


def test_relations_are_antisymmetric() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    generator = torch.Generator().manual_seed(3)
    count = 0
    for _ in range(200):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values.flatten(1).tolist()
        one, two = tuple(corners[0]), tuple(corners[1])
        assert relations(two, one) == {opposite[name] for name in relations(one, two)}
        count += len(relations(one, two))
    assert count > 50


def test_keep_sorts_and_drops() -> None:
    candidates = [det("cat", 0.4), det("dog", 0.9), det("cat", 0.8), det("cat", 0.2)]
    kept = keep(candidates, 0.3, max_objects=1)
    assert {label: [d.score for d in group] for label, group in kept.items()} == {"cat": [0.8], "dog": [0.9]}


def test_colours_are_classified_only_if_needed() -> None:
    def never(detections):
        raise AssertionError("a colour was classified")

    evaluate({"include": TWO_RED_CATS}, [det("cat")], never)  # one cat is not enough
    evaluate({"include": [clause_of("cat")]}, [det("cat")], never)  # no colour is requested


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "at least one object under `include`"),
        ({"include": []}, "at least one object under `include`"),
        ({"include": [clause_of("cat", 0)]}, "a `count` >= 1. Found"),
        ({"include": [{"count": 1}]}, "must have a `class`"),
        ({"include": [clause_of("cat")], "exclude": [clause_of("cat", 0)]}, "a `count` >= 1. Found"),
        ({"include": [clause_of("cat", "2")]}, "a `count` >= 1. Found"),
        ({"include": ["cat"]}, "each clause must have a `class` and a `count` >= 1. Found 'cat'"),
        ({"include": "cat"}, "`include` must be a list of clauses. Found 'cat'"),
        ({"include": [clause_of("cat")], "exclude": None}, "`exclude` must be a list of clauses. Found None"),
        ({"include": [clause_of("cat", color=["red"])]}, r"`color` must be the name of a colour. Found \['red'\]"),
        (
            {"include": [clause_of("cat"), clause_of("dog", position=["near", 0])]},
            "a pair of one of left of, .*Found .'near', 0.",
        ),
        ({"include": [clause_of("cat"), clause_of("dog", position="above")]}, "a pair of one of left of, .*Found 'above'"),
        ({"include": [clause_of("cat", position=["above", 0])]}, "must refer to an earlier clause"),
        ({"include": [clause_of("cat"), clause_of("dog", position=["above", -1])]}, "must refer to an earlier clause"),
    ],
)
def test_malformed_metadata_is_refused(metadata: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(metadata, [], colours)
