"""The choice among several servers that answer alike: the least busy one that has not failed lately."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

REST = 30.0
"""Seconds for which a server that failed gets no request, as long as another one works."""


class Failure(NamedTuple):
    """Why a server failed last, and the time on the monotonic clock from which it is tried again."""

    cause: str
    until: float


class Replicas:
    """Servers with their failures, which are remembered from one batch to the next.

    Args:
        urls: URLs of the servers, one or more.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self._failures: dict[str, Failure] = {}
        self._chance = random.Random()  # ranks share the seed of Python's own generator

    def __reduce__(self) -> Any:
        return Replicas, (self.urls,)  # another process has another clock

    def choose(self, busy: Counter[str], tried: Collection[str] = ()) -> str:
        """Choose the server of the next attempt.

        It is the one with the fewest requests in flight, by chance among equals, so that the ranks of a run do not all begin
        with the same one. Servers that rest after a failure are left out, unless all rest; then it is the one that rests no
        longer first. A server that has failed gets one attempt at a time until it answers.

        Args:
            busy: Requests in flight at each server.
            tried: Servers that are not to be chosen, not all.
        """
        now, failures = time.monotonic(), self._failures.copy()  # a copy, since another thread may score too
        candidates = [url for url in self.urls if url not in tried]
        awake = [url for url in candidates if url not in failures or failures[url].until <= now]
        if awake:
            url = min(awake, key=lambda url: (busy[url], self._chance.random()))
        else:
            url = min(candidates, key=lambda url: failures[url].until)
        if url in failures:
            self.failed(url, failures[url].cause)
        return url

    def failed(self, url: str, cause: str, rest: float = 0.0) -> bool:
        """Leave a server out for `rest` seconds, 0 means `REST`; returns whether it worked before."""
        worked = url not in self._failures
        self._failures[url] = Failure(cause, time.monotonic() + (rest or REST))
        return worked

    def works(self, url: str) -> bool:
        """Record that a server has answered; returns whether it had failed before."""
        return self._failures.pop(url, None) is not None

    def causes(self) -> dict[str, str]:
        """The cause of each server's last failure."""
        return {url: failure.cause for url, failure in self._failures.copy().items()}
