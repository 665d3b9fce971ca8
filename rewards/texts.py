"""Texts of any length: what messages quote of them, and what models read of them."""

from typing import Any

QUOTED = 200
"""Characters that a message quotes of somebody else's text."""

TOKEN_LENGTH = 100
"""Characters kept per token that a model reads: more than any token of CLIP's, T5's and BERT's vocabularies has."""


def cut(text: str, limit: int = QUOTED) -> str:
    """A text for a message, cut where it is longer than `limit`, with its length.

    >>> cut("abcdef" * 1000, limit=4)
    'abcd... (6000 characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def excerpt(value: Any, limit: int = QUOTED) -> str:
    """A value for a message, as Python writes it and cut.

    >>> excerpt("a cat"), excerpt("abcdef" * 1000, limit=4)
    ("'a cat'", "'abcd'... (6000 characters)")
    """
    if isinstance(value, str) and len(value) > limit:  # the whole is not escaped first
        return f"{value[:limit]!r}... ({len(value)} characters)"
    return cut(repr(value), limit)


def reason(error: BaseException, limit: int = 10 * QUOTED) -> str:
    """What an exception says, cut; an exception whose text cannot be had is still reported.

    >>> reason(ValueError("no letters"))
    'no letters'
    """
    try:
        return cut(str(error), limit)
    except Exception as other:  # noqa: BLE001 - the first error must not be lost for a second one in its text
        return f"(no text: its `__str__` raises {type(other).__name__})"


def beginning(text: str, tokens: int) -> str:
    """The part of a text that a model of so many tokens can read, so that a tokenizer need not go through all of it.

    >>> beginning("a cat", tokens=77)
    'a cat'
    >>> len(beginning("a cat " * 100_000, tokens=77))
    7700
    """
    return text[: tokens * TOKEN_LENGTH]
