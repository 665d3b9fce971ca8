"""Shorten long texts for error messages and for tokenizers."""

from typing import Any

QUOTED = 200
"""Maximum number of characters that a message quotes from a text."""

TOKEN_LENGTH = 100
"""Characters kept per token that a model reads. No token of the vocabularies of CLIP, T5 and BERT is longer."""


def shorten(text: str, limit: int = QUOTED) -> str:
    """Cut a text for a message to `limit` characters, and add the full length if it was longer.

    >>> shorten("abcdef" * 1000, limit=4)
    'abcd... (6000 characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def excerpt(value: Any, limit: int = QUOTED) -> str:
    """Return the `repr` of a value for a message, cut to `limit` characters.

    >>> excerpt("a cat"), excerpt("abcdef" * 1000, limit=4)
    ("'a cat'", "'abcd'... (6000 characters)")
    """
    if isinstance(value, str) and len(value) > limit:  # avoids escaping the whole text
        return f"{value[:limit]!r}... ({len(value)} characters)"
    return shorten(repr(value), limit)


def reason(error: BaseException, limit: int = 10 * QUOTED) -> str:
    """Return the text of an exception, cut to `limit` characters, even if its `__str__` fails.

    >>> reason(ValueError("no letters"))
    'no letters'
    """
    try:
        return shorten(str(error), limit)
    except Exception as str_error:  # noqa: BLE001 - an error in `__str__` must not hide the first error
        return f"(no text: its `__str__` raises {type(str_error).__name__})"


def truncate(text: str, tokens: int) -> str:
    """Cut a text to the part that a model of `tokens` tokens can read, so that the tokenizer skips the rest.

    >>> truncate("a cat", tokens=77)
    'a cat'
    >>> len(truncate("a cat " * 100_000, tokens=77))
    7700
    """
    return text[: tokens * TOKEN_LENGTH]
