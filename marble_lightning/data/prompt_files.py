"""Prompt files: one reader per format, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rewards import Prompt
from rewards.texts import excerpt, reason, shorten

Split = Literal["train", "test"]

SHOWN = 60
"""Characters of a wrong line that an error shows."""


def read_prompts(folder: Path, source: str, split: Split) -> list[Prompt]:
    """Read the prompts of one source, in the order of their file; blank lines are ignored.

    A folder has one of three formats, tried in this order:

    - `{split}.jsonl`: all sources in one file, with one JSON object per line. `prompt` is the text, `source` is its
      source, the other keys are the metadata.
    - `{source}/{split}.txt`, as published: one prompt per line.
    - `{source}/{split}_metadata.jsonl`, as published: one JSON object per line. `prompt` is the text, the other keys are
      the metadata.

    Args:
        folder: Folder with the files above.
        source: Name of the source.
        split: `train` or `test`.

    Raises:
        ValueError: The source is unknown, the file is empty, or a line is not UTF-8, is not a JSON object that can be
            written as JSON in UTF-8, or lacks a text; the message names file and line.
    """
    file = prompt_file(folder, source, split)
    if file.suffix == ".txt":
        prompts = [Prompt(line, source) for _, line in _lines(file)]
    elif file.parent == folder:
        all_prompts = [_prompt(record, _text(record, "source", place), place, "source") for place, record in _records(file)]
        prompts = [prompt for prompt in all_prompts if prompt.source == source]
        if all_prompts and not prompts:
            known = ", ".join(sorted({prompt.source for prompt in all_prompts}))
            raise ValueError(
                f"`sources` must name values of `source` in {file.resolve()}. Found {source!r}; known: {shorten(known)}."
            )
    else:
        prompts = [_prompt(record, source, place) for place, record in _records(file)]
    if not prompts:
        raise ValueError(f"A prompt file must have at least one prompt. Found none in {file}.")
    return prompts


def read_prompt_file(file: Path) -> list[Prompt]:
    """Read a custom file: `.txt`, a prompt per line; or `.jsonl`, a JSON object per line, with `prompt` and its metadata.

    The source of a prompt is `source` of its JSON object, if present, or else the file's name without its suffix.

    Raises:
        ValueError: There is no such file, it has another suffix or no prompt, or `read_prompts` would refuse a line.
    """
    if file.suffix not in (".txt", ".jsonl") or not file.is_file():
        raise ValueError(
            "`data.predict_file` must be a .txt with one prompt per line or a .jsonl with one JSON object per line. "
            f"Found {'' if file.is_file() else 'no file '}{file.resolve()}."
        )
    if file.suffix == ".txt":
        prompts = [Prompt(line, file.stem) for _, line in _lines(file)]
    else:
        records = [({"source": file.stem, **record}, place) for place, record in _records(file)]
        prompts = [_prompt(record, _text(record, "source", place), place, "source") for record, place in records]
    if not prompts:
        raise ValueError(f"A prompt file must have at least one prompt. Found none in {file}.")
    return prompts


def prompt_file(folder: Path, source: str, split: Split) -> Path:
    """The file that `read_prompts` reads.

    Raises:
        ValueError: There is none.
    """
    names = (f"{split}.jsonl", f"{source}/{split}.txt", f"{source}/{split}_metadata.jsonl")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise ValueError(
            f"`data.folder` must be a folder with prompt files. Found no folder {folder.resolve()}, looking for {source!r}."
        )
    known = sorted(
        {file.parent.name for name in (f"{split}.txt", f"{split}_metadata.jsonl") for file in folder.glob(f"*/{name}")}
    )
    raise ValueError(
        f"`sources` must name folders of {folder.resolve()} with {split}.txt or {split}_metadata.jsonl, or values of "
        f"`source` in a {split}.jsonl there. Found {source!r}; known: {', '.join(known) or 'none'}."
    )


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Remove prompts with the same text, source and metadata as an earlier one; the order stays.

    >>> [prompt.text for prompt in distinct([Prompt("b", "x"), Prompt("a", "x"), Prompt("b", "x")])]
    ['b', 'a']
    """
    first: dict[tuple[str, str, str], Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.text, prompt.source, json.dumps(prompt.metadata, sort_keys=True)), prompt)
    return list(first.values())


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Non-blank lines, each with its place, `file:number`."""
    # Bytes are split at line feeds and carriage returns only; str.splitlines also splits at characters within prompts.
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}:{number} must be UTF-8. Found {excerpt(line, SHOWN)}: {error.reason}.") from error
        if text:
            yield f"{file}:{number}", text


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(file):
        try:
            record = json.loads(line)
            # Python also reads text that it cannot write as UTF-8 (half of a surrogate pair) and invalid JSON (NaN, 1e999).
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # ValueError: includes numbers with thousands of digits
            raise ValueError(
                f"{place} must be a JSON object in UTF-8, with finite numbers. Found {excerpt(line, SHOWN)}: "
                f"{reason(error)}."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{place} must be a JSON object with a text under `prompt`. Found {excerpt(line, SHOWN)}.")
        yield place, record


def _text(record: dict[str, Any], key: str, place: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        wrong = excerpt(text, SHOWN) if key in record else f"no `{key}` in {excerpt(record, SHOWN)}"
        raise ValueError(f"{place} must be a JSON object with a text under `{key}`. Found {wrong}.")
    return text


def _prompt(record: dict[str, Any], source: str, place: str, *no_metadata: str) -> Prompt:
    text = _text(record, "prompt", place)
    metadata = {key: value for key, value in record.items() if key not in ("prompt", *no_metadata)}
    try:
        return Prompt(text, source, metadata)
    except ValueError as error:
        raise ValueError(f"{place} must hold a prompt. Found {excerpt(text, SHOWN)}: {error}") from error
