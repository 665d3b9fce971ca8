"""Prompts are immutable, because all rewards share them."""

import copy
import json
import operator
import pickle
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from rewards import Prompt

METADATA = {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}], "pair": (1, [2])}


@pytest.fixture
def prompt() -> Prompt:
    return Prompt("a cat", "geneval", copy.deepcopy(METADATA))


CHANGES = {
    "a key": lambda metadata: operator.setitem(metadata, "tag", "x"),
    "no key": lambda metadata: operator.delitem(metadata, "tag"),
    "an update": lambda metadata: metadata.update(tag="x"),
    "an update in place": lambda metadata: operator.ior(metadata, {"tag": "x"}),
    "a default": lambda metadata: metadata.setdefault("new", 1),
    "a pop": lambda metadata: metadata.pop("tag"),
    "the last item": lambda metadata: metadata.popitem(),
    "everything": lambda metadata: metadata.clear(),
    "a clause": lambda metadata: operator.setitem(metadata["include"][0], "count", 2),
    "another clause": lambda metadata: metadata["include"].append({"class": "dog", "count": 1}),
    "several clauses": lambda metadata: operator.iadd(metadata["include"], [1]),
    "many clauses": lambda metadata: operator.imul(metadata["include"], 2),
    "no clause": lambda metadata: operator.delitem(metadata["include"], 0),
    "the order": lambda metadata: metadata["include"].reverse(),
    "the relation": lambda metadata: operator.setitem(metadata["include"][0]["position"], 0, "above"),
    "a list in a tuple": lambda metadata: metadata["pair"][1].extend([3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_is_immutable(prompt: Prompt, change: str) -> None:
    with pytest.raises(TypeError, match="`metadata` must stay as it is"):
        CHANGES[change](prompt.metadata)
    assert prompt.metadata == METADATA


def test_fields_are_immutable_and_the_callers_mapping_is_copied() -> None:
    metadata = copy.deepcopy(METADATA)
    prompt = Prompt("a cat", "geneval", metadata)
    with pytest.raises(FrozenInstanceError):
        prompt.text = "a dog"  # type: ignore[misc]
    metadata["include"][0]["count"] = 7
    assert prompt.metadata == METADATA


def test_metadata_equals_and_prints_like_the_original(prompt: Prompt) -> None:
    """Derived seeds use the repr, prompt sets use JSON, worker processes use pickle."""
    assert repr(prompt) == f"Prompt(text='a cat', source='geneval', metadata={METADATA!r})"
    assert json.dumps(prompt.metadata) == json.dumps(METADATA)
    assert isinstance(prompt.metadata, dict) and isinstance(prompt.metadata["include"], list)
    assert prompt == Prompt("a cat", "geneval", METADATA) != Prompt("a cat", "geneval", {})


@pytest.mark.parametrize(
    "copied",
    [
        lambda prompt: pickle.loads(pickle.dumps(prompt)),
        copy.copy,
        copy.deepcopy,
        lambda prompt: replace(prompt, text="a cat"),
        lambda prompt: Prompt(**asdict(prompt)),
    ],
)
def test_copies_are_equal_and_immutable(prompt: Prompt, copied) -> None:
    other = copied(prompt)
    assert other == prompt and repr(other) == repr(prompt)
    for change in CHANGES.values():
        with pytest.raises(TypeError, match="must stay as it is"):
            change(other.metadata)


def test_a_mutable_copy_by_json(prompt: Prompt) -> None:
    other = json.loads(json.dumps(prompt.metadata))
    other["include"][0]["count"] = 2
    assert prompt.metadata == METADATA != other


def test_too_deep_metadata_is_refused() -> None:
    deep: dict = {}
    deep["self"] = deep
    with pytest.raises(ValueError, match="`metadata` must not nest more than 100"):
        Prompt("a cat", "geneval", deep)
