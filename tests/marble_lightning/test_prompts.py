"""Prompt files and rounds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from marble_lightning.prompts import PromptDataModule, draw_round, read_prompts
from marble_lightning.tinyworld import PROMPTS

SOURCES = ("pickscore", "ocr", "geneval")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.txt").write_text("".join(f"{name} {split} {i}\n" for i in range(10)))
    return tmp_path


def test_text_and_metadata_files():
    text = read_prompts(PROMPTS, "ocr", "test")
    assert all(prompt.source == "ocr" and '"' in prompt.text and not prompt.metadata for prompt in text)
    records = read_prompts(PROMPTS, "geneval", "test")
    assert all(prompt.metadata["include"] and "prompt" not in prompt.metadata for prompt in records)


@pytest.mark.parametrize("source", SOURCES)
def test_held_out_prompts_are_not_trained_on(source):
    train, test = ({prompt.text for prompt in read_prompts(PROMPTS, source, split)} for split in ("train", "test"))
    assert len(test) >= 50
    assert not train & test


def test_a_round_is_balanced_distinct_and_split_over_ranks(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=8, images_per_prompt=2)
    data.setup("fit")
    ranks = [data.round(seed=1, index=3, rank=rank, ranks=2) for rank in range(2)]
    together = [prompt for part in ranks for prompt in part]
    assert len({prompt.text for prompt in together}) == 8
    assert Counter(prompt.source for prompt in together) == {"a": 4, "b": 4}
    assert all(Counter(prompt.source for prompt in part) == {"a": 2, "b": 2} for part in ranks)
    whole = data.round(seed=1, index=3, rank=0, ranks=1)
    assert {p.text for p in whole} == {p.text for p in together}


def test_rounds_depend_on_seed_and_index_only(folder):
    pools = {"a": read_prompts(folder, "a", "train")}
    first, again, later, other = (
        draw_round(pools, {"a": 1}, turns=4, seed=seed, index=index) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != later
    assert first != other


def test_sources_may_have_unequal_shares(folder):
    data = PromptDataModule(str(folder), {"a": 1, "b": 3}, prompts_per_round=8, images_per_prompt=2)
    data.setup("fit")
    ranks = [data.round(seed=0, index=0, rank=rank, ranks=2) for rank in range(2)]
    assert all([prompt.source for prompt in part] == ["a", "b", "b", "b"] for part in ranks)
    assert len({prompt.text for part in ranks for prompt in part}) == 8


def test_held_out_pictures_are_repeated_and_capped(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=2, held_out_per_source=3, held_out_images=2)
    data.setup("validate")
    assert [prompt.text for prompt in data.held_out[:3]] == ["a test 0", "a test 0", "a test 1"]
    assert len(data.held_out) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "must be a JSON object"),
        ('["prompt"]', "text under `prompt`"),
        ('{"tag": "x"}', "text under `prompt`"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder, line, message):
    (folder / "c").mkdir()
    file = folder / "c" / "train_metadata.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(folder, "c", "train")
    assert f"{file}:2" in str(error.value)


def test_unknown_and_empty_sources(folder):
    with pytest.raises(ValueError, match="Found 'z'; known: a, b"):
        read_prompts(folder, "z", "train")
    (folder / "a" / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        read_prompts(folder, "a", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"sources": ["a", "a"]}, "each once"),
        ({"sources": {"a": 1, "b": 0}}, "a share >= 1"),
        ({"prompts_per_round": 3}, "multiple of the sum of the shares of `sources`, 2. Found 3; try 4"),
        ({"images_per_prompt": 1}, "`images_per_prompt` must be >= 2"),
        ({"held_out_images": 0}, "`held_out_images` must be >= 1. Found 0"),
        ({"prompts_per_round": 0}, "`prompts_per_round` must be >= 1. Found 0"),
        ({"held_out_per_source": -1}, "`held_out_per_source` must be >= 1. Found -1"),
    ],
)
def test_impossible_sizes(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{"folder": str(folder), "sources": ["a", "b"], "prompts_per_round": 4, **options})


def test_more_prompts_than_the_file_has(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=22)
    with pytest.raises(ValueError, match="takes 11 distinct prompts of 'a'. Found 10"):
        data.setup("fit")
