"""Readers of prompt files: every format, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.data.prompt_files import distinct, read_prompts
from marble_lightning.tinyworld import PROMPTS
from rewards import Prompt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources `a` and `b` in one JSONL file per split."""
    for split in ("train", "test"):
        records = [{"prompt": f"{name} {split} {i}", "source": name, "tag": i} for i in range(4) for name in "ab"]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_text_and_metadata_files():
    text = read_prompts(PROMPTS, "ocr", "test")
    assert all(prompt.source == "ocr" and '"' in prompt.text and not prompt.metadata for prompt in text)
    records = read_prompts(PROMPTS, "geneval", "test")
    assert all(prompt.metadata["include"] and "prompt" not in prompt.metadata for prompt in records)


def test_one_file_of_all_sources(folder):
    assert read_prompts(folder, "b", "train") == [Prompt(f"b train {i}", "b", {"tag": i}) for i in range(4)]
    data = PromptDataModule(str(folder), ["b", "a"], prompts_per_round=4, images_per_prompt=2)
    data.setup("fit")
    assert [prompt.source for prompt in data.round(0, 0, 0, 1)] == ["b", "a", "b", "a"]
    assert [prompt.text for prompt in data.held_out[:2]] == ["b test 0", "b test 1"]


def test_one_file_of_all_sources_has_priority_over_folders(folder):
    (folder / "a").mkdir()
    (folder / "a" / "train.txt").write_text("other\n")
    assert read_prompts(folder, "a", "train")[0].text == "a train 0"


def test_lines_end_at_line_feeds_only(tmp_path):
    """Other line separators stay part of a prompt; a byte order mark and Windows line ends are removed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.txt").write_bytes("\ufeffone\u2028still one\r\n\r\ntwo\x85still two\n".encode())
    texts = [prompt.text for prompt in read_prompts(tmp_path, "a", "train")]
    assert texts == ["one\u2028still one", "two\x85still two"]


def test_distinct_compares_metadata_too():
    one, other = Prompt("x", "a", {"p": 1, "q": [2]}), Prompt("x", "a", {"p": 1, "q": [3]})
    assert distinct([one, other, Prompt("x", "a", {"q": [2], "p": 1})]) == [one, other]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "must be a JSON object"),
        (b'["prompt"]', "text under `prompt`"),
        (b'{"tag": "x"}', "text under `prompt`. Found no `prompt`"),
        (b'{"prompt": 3, "source": "c"}', "text under `prompt`. Found 3"),
        (b'{"prompt": " ", "source": "c"}', "text under `prompt`. Found ' '"),
        (b'{"prompt": "\xff"}', "must be UTF-8. Found .*invalid start byte"),
        (rb'{"prompt": "\ud83d", "source": "c"}', "must be a JSON object in UTF-8.*surrogates not allowed"),
        (
            rb'{"prompt": "x", "source": "c", "tag": [{"\udc00": 1}]}',
            "must be a JSON object in UTF-8.*surrogates not allowed",
        ),
        (b'{"prompt": "x", "source": "c", "n": ' + b"9" * 5000 + b"}", "must be a JSON object.*5000 digits"),
        (b'{"prompt": "x", "source": "c", "n": 1e999}', "with finite numbers.*not JSON compliant"),
        (b'{"prompt": "x", "source": "c", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "must be a JSON object.*recursion"),
        (b'{"prompt": "x", "source": "c", "n": ' + b"[" * 200 + b"]" * 200 + b"}", "must hold a prompt.*must not nest more"),
    ],
)
@pytest.mark.parametrize("name", ["c/train_metadata.jsonl", "train.jsonl"])
def test_errors_of_bad_lines_name_file_and_line(tmp_path, name, line, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    line = line.replace(b'{"tag"', b'{"source": "c", "tag"')
    file.write_bytes(json.dumps({"prompt": "fine", "source": "c"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path, "c", "train")
    assert f"{file}:3 must " in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(("source", "shown"), [({}, "no `source`"), ({"source": None}, "None"), ({"source": 7}, "7")])
def test_a_file_of_all_sources_must_name_them(folder, source, shown):
    """In every line, also when another source is read."""
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x", **source}) + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl:9 must be a JSON object with a text under `source`. Found {shown}"):
        read_prompts(folder, "a", "train")


def test_unknown_and_empty_sources(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"values of `source` in .*train\.jsonl. Found 'z'; known: a, b"):
        read_prompts(folder, "z", "train")
    with pytest.raises(ValueError, match="Found 'z'; known: geneval, ocr, pickscore"):
        read_prompts(PROMPTS, "z", "test")
    with pytest.raises(ValueError, match="must be a folder with prompt files. Found no folder .*nowhere"):
        read_prompts(folder / "nowhere", "z", "test")
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ValueError, match="Found 'z'; known: none"):
        read_prompts(other, "z", "test")
    for name in ("train.jsonl", "a/test.txt", "b/test_metadata.jsonl"):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text("\n \n")
        with pytest.raises(ValueError, match=f"at least one prompt. Found none in {other / name}"):
            read_prompts(other, "b" if name.startswith("b") else "a", "train" if name == "train.jsonl" else "test")
