"""Prompt files: one reader per format, and errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rewards import Prompt
from rewards.texts import cut, excerpt, reason

Split = Literal["train", "test"]

SHOWN = 60
"""Characters of a wrong line that an error shows."""


def read_prompts(folder: Path, source: str, split: Split) -> list[Prompt]:
    """Read the prompts of one source, in the order of their file; blank lines do not count.

    A folder has one of three formats, looked for in this order:

    - `{split}.jsonl`: all sources in one file, a JSON object a line. `prompt` is the text, `source` says which source it
      belongs to, the other keys are the metadata.
    - `{source}/{split}.txt`, as published: a prompt a line.
    - `{source}/{split}_metadata.jsonl`, as published: a JSON object a line. `prompt` is the text, the other keys are the
      metadata.

    Args:
        folder: Folder with the files above.
        source: Name of the source.
        split: `train` or `test`.

    Raises:
        ValueError: An unknown source, an empty file, or a line that is not UTF-8, not a JSON object that can be written
            again as JSON in UTF-8, or without a text where there must be one; names file and line.
    """
    file = prompt_file(folder, source, split)
    if file.suffix == ".txt":
        prompts = [Prompt(line, source) for _, line in _lines(file)]
    elif file.parent == folder:
        everything = [_prompt(record, _text(record, "source", place), place, "source") for place, record in _records(file)]
        prompts = [prompt for prompt in everything if prompt.source == source]
        if everything and not prompts:
            known = ", ".join(sorted({prompt.source for prompt in everything}))
            raise ValueError(
                f"`sources` must name values of `source` in {file.resolve()}. Found {source!r}; known: {cut(known)}."
            )
    else:
        prompts = [_prompt(record, source, place) for place, record in _records(file)]
    if not prompts:
        raise ValueError(f"A prompt file must have at least one prompt. Found none in {file}.")
    return prompts


def read_prompt_file(file: Path) -> list[Prompt]:
    """Read a file of one's own: `.txt`, a prompt a line; or `.jsonl`, a JSON object a line, with `prompt` and its metadata.

    The source of a prompt is the file's name without its ending, where a JSON object does not say it under `source`.

    Raises:
        ValueError: No such file, another ending, no prompt, or a line that `read_prompts` would not take.
    """
    if file.suffix not in (".txt", ".jsonl") or not file.is_file():
        raise ValueError(
            "`data.predict_file` must be a .txt with a prompt a line or a .jsonl with a JSON object a line. "
            f"Found {'' if file.is_file() else 'no file '}{file.resolve()}."
        )
    if file.suffix == ".txt":
        prompts = [Prompt(line, file.stem) for _, line in _lines(file)]
    else:
        whole = [({"source": file.stem, **record}, place) for place, record in _records(file)]
        prompts = [_prompt(record, _text(record, "source", place), place, "source") for record, place in whole]
    if not prompts:
        raise ValueError(f"A prompt file must have at least one prompt. Found none in {file}.")
    return prompts


def prompt_file(folder: Path, source: str, split: Split) -> Path:
    """The file that `read_prompts` reads.

    Raises:
        ValueError: Where there is none.
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
        {there.parent.name for name in (f"{split}.txt", f"{split}_metadata.jsonl") for there in folder.glob(f"*/{name}")}
    )
    raise ValueError(
        f"`sources` must name folders of {folder.resolve()} with {split}.txt or {split}_metadata.jsonl, or values of "
        f"`source` in a {split}.jsonl there. Found {source!r}; known: {', '.join(known) or 'none'}."
    )


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of all prompts that have the same text, source and metadata, in the same order.

    >>> [prompt.text for prompt in distinct([Prompt("b", "x"), Prompt("a", "x"), Prompt("b", "x")])]
    ['b', 'a']
    """
    first: dict[tuple[str, str, str], Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.text, prompt.source, json.dumps(prompt.metadata, sort_keys=True)), prompt)
    return list(first.values())


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place, `file:number`."""
    # Bytes end lines at line feeds and carriage returns only; text would also at characters that prompts may contain.
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
            # Python reads more than it can write as UTF-8 (half of a surrogate pair) or others read as JSON (NaN, 1e999).
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
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
        found = excerpt(text, SHOWN) if key in record else f"no `{key}` in {excerpt(record, SHOWN)}"
        raise ValueError(f"{place} must be a JSON object with a text under `{key}`. Found {found}.")
    return text


def _prompt(record: dict[str, Any], source: str, place: str, *no_metadata: str) -> Prompt:
    text = _text(record, "prompt", place)
    metadata = {key: value for key, value in record.items() if key not in ("prompt", *no_metadata)}
    try:
        return Prompt(text, source, metadata)
    except ValueError as error:
        raise ValueError(f"{place} must hold a prompt. Found {excerpt(text, SHOWN)}: {error}") from error
