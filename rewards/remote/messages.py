"""A request to a server, its answer, and what an answer or an error says."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import aiohttp

from rewards.remote.transport import quote

LASTING = (501, 505)
"""HTTP statuses of a server that will never support the method or the version of HTTP."""


class Answer(NamedTuple):
    """A server's answer; `url` has the path of the request and no secrets."""

    url: str
    status: int
    reason: str
    body: bytes

    @property
    def is_temporary(self) -> bool:
        """Whether the status is one of a temporary failure, after which another attempt may succeed."""
        return self.status in (408, 429) or (self.status >= 500 and self.status not in LASTING)

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {quote(self.body[:10_000].decode(errors='replace'))}"


class Failed(NamedTuple):
    """An attempt without a valid answer: its cause, and the pause in seconds that the server requests."""

    cause: str
    pause: float


class Request(NamedTuple):
    """A request.

    Args:
        path: Path below a server's URL.
        read: Called with the answer as soon as it arrives. It may raise.
        body: Builds the body of a POST, in a thread. None: a GET.
        url: The only server that may answer. None: any of the client's.
    """

    path: str
    read: Callable[[Answer], Any]
    body: Callable[[], bytes] | None = None
    url: str | None = None


def retry_after(header: str) -> float:
    """Return the seconds that a Retry-After header (a number or a date) specifies; 0 if it is neither.

    >>> retry_after("5"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), retry_after("-1"), retry_after("nan")
    (5.0, 0.0, 0.0, 0.0)
    """
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def describe(error: aiohttp.ClientError) -> str:
    """Return the text of a failed connection, with the reason of the operating system."""
    number = getattr(error, "errno", None) or 0
    return quote(f"{error or type(error).__name__}{f' ({os.strerror(number)})' if number > 0 else ''}")
