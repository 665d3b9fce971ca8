"""A JSON client for one or several HTTP servers: concurrent requests, each with one deadline and a bounded answer size."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from rewards.redaction import strip_secrets
from rewards.remote.addresses import is_token, proxy_of
from rewards.remote.messages import Answer, Failed, Request, describe, retry_after
from rewards.remote.replicas import Replicas
from rewards.remote.transport import quote

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0
"""Maximum seconds between two attempts, even if a server's Retry-After is longer."""
LARGEST_ANSWER = 4 * 2**20
"""Maximum bytes of an answer. An answer with the scores of a thousand images has about 25000."""
CONNECTING = 10.0
"""Seconds to connect, where other servers can take the request instead."""

Result = TypeVar("Result")


class Unreachable(ConnectionError):
    """No server has answered, after a number of attempts."""

    attempts = 0


@dataclass(frozen=True)
class JsonClient:
    """Send requests to a server, or each to one of several that answer alike, with retries and a deadline.

    Args:
        owner: Name of the reward, for error messages.
        urls: URLs of the servers, `http` or `https`, as returned by `check_urls`.
        remedy: Remedy for an unexpected answer, for error messages.
        concurrency: Maximum number of simultaneous requests, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        deadline: Seconds for a request with all its attempts and the pauses between them, > 0.
        retries: Number of further attempts at each server, >= 0.
        backoff: The first retry is immediate, the second waits twice this many seconds, and each later one waits twice as
            long as the one before, >= 0. Another server is tried at once.
        token: Bearer token. None: no token is sent.

    Raises:
        ValueError: if an argument is out of range.
    """

    owner: str
    urls: Sequence[str]
    remedy: str
    concurrency: int
    timeout: float
    deadline: float
    retries: int
    backoff: float = 0.5
    token: str | None = field(default=None, repr=False)
    replicas: Replicas = field(init=False, repr=False, compare=False)
    unchecked: dict[str, Request] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Request that checks a server, by URL, for servers that have not answered it yet."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", Replicas(self.urls))
        for name, low, use in (
            ("concurrency", 1, "It is the number of simultaneous requests"),
            ("retries", 0, "0 gives up at the first failure"),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{self.owner}: `{name}` must be >= {low}. Found {getattr(self, name)}. {use}.")
        for name, use in (
            ("timeout", "Allow for the slowest answer"),
            ("deadline", "Allow for all attempts of a request; .inf means no deadline"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.owner}: `{name}` must be > 0 seconds. Found {getattr(self, name)}. {use}.")
        if not self.backoff >= 0:
            raise ValueError(
                f"{self.owner}: `backoff` must be >= 0 seconds. Found {self.backoff}. 0.5 is gentle to a server."
            )
        if self.token is not None and not is_token(self.token):
            raise ValueError(f"{self.owner}: a token or key must be ASCII letters without spaces. Found others. Correct it.")
        if self.token is not None and any("@" in urlsplit(url).netloc for url in self.urls):
            raise ValueError(f"{self.owner}: a URL with a user must come without a token. Found both. Remove the user.")

    def connect(self, check: Request) -> None:
        """Check all servers by a request; one that is unreachable is checked before it is used, unless all are.

        Raises:
            ConnectionError: if no server is reachable, or one answers an error.
            ValueError: if the answer of one is wrong.
        """
        requests = [check._replace(url=url) for url in self.urls]
        outcomes = run_in_new_loop(lambda: self._ask(requests, return_exceptions=True))
        silent = {url: outcome for url, outcome in zip(self.urls, outcomes, strict=True) if isinstance(outcome, Unreachable)}
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Unreachable):
                raise outcome
        if len(silent) == len(self.urls):
            raise self._unreachable(check, sum(error.attempts for error in silent.values()), self.replicas.causes())
        self.unchecked.update(dict.fromkeys(silent, check))

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """Return the results of `Request.read`, in the order of the requests; after a failure no new request starts.

        Raises:
            ConnectionError: if all servers are unreachable or too slow, or still answer errors after all attempts.
            ValueError: if an answer is too large.
        """
        return run_in_new_loop(lambda: self._ask(requests))

    async def _ask(self, requests: Sequence[Request], return_exceptions: bool = False) -> list[Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        slots, busy = asyncio.Semaphore(self.concurrency), Counter[str]()
        async with aiohttp.ClientSession(
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=0),  # `slots` limits the connections
            auto_decompress=False,  # a small answer may expand to any size
            # no total: `asyncio.timeout` limits each attempt
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECTING if len(self.urls) > 1 else None),
        ) as session:

            async def send(request: Request) -> Any:
                async with slots:
                    return request.read(await self._send(session, request, busy))

            tasks = [asyncio.ensure_future(send(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks, return_exceptions=return_exceptions)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, session: aiohttp.ClientSession, request: Request, busy: Counter[str]) -> Answer:
        body = await asyncio.to_thread(request.body) if request.body else None
        end, servers = time.monotonic() + self.deadline, 1 if request.url else len(self.urls)
        causes, pauses, tried = self.replicas.causes(), list[float](), set[str]()
        while True:
            tried = tried if len(tried) < servers else set()  # each server has one attempt before the next pause
            url = request.url or self.replicas.choose(busy, tried)
            busy[url] += 1
            try:
                outcome = await self._attempt(session, url, request, body, min(self.timeout, end - time.monotonic()))
            finally:
                busy[url] -= 1
            if isinstance(outcome, Answer):
                return outcome
            causes[url] = outcome.cause
            tried.add(url)
            pauses.append(outcome.pause)
            rounds, rest = divmod(len(pauses), servers)
            pause = 0.0 if rest else self._backoff(rounds, min(pauses[-servers:]))  # another server is asked at once
            if rounds > self.retries or time.monotonic() + pause >= end:
                raise self._unreachable(request, len(pauses), causes)
            await asyncio.sleep(pause)

    def _backoff(self, rounds: int, requested: float) -> float:
        # Random jitter, so that requests that failed together do not retry together.
        pause = 0.0 if rounds == 1 else self.backoff * (2.0 ** min(rounds - 1, 30) + random.random())
        return min(max(pause, requested), LONGEST_PAUSE)

    async def _attempt(
        self, session: aiohttp.ClientSession, url: str, request: Request, body: bytes | None, limit: float
    ) -> Answer | Failed:
        """Send a request once, and record whether the server works."""
        outcome: Answer | Failed
        try:
            async with asyncio.timeout(limit):
                outcome = await self._check_first(session, url) or await self._exchange(session, url + request.path, body)
        except aiohttp.ClientError as error:
            outcome = Failed(describe(error), 0.0)
        except TimeoutError:
            outcome = Failed(f"timed out after {limit:.3g} s", 0.0)
        if isinstance(outcome, Answer):
            if self.replicas.works(url):
                logger.info("%s: %s answers again.", self.owner, strip_secrets(url))
        elif self.replicas.failed(url, outcome.cause, outcome.pause) and len(self.urls) > 1:
            logger.warning("%s: %s is left out, because it failed: %s.", self.owner, strip_secrets(url), outcome.cause)
        return outcome

    async def _check_first(self, session: aiohttp.ClientSession, url: str) -> Failed | None:
        """Check a server that was unreachable at the start; None if it may be used. One that refuses has failed."""
        check = self.unchecked.get(url)
        if check is None:
            return None
        outcome = await self._exchange(session, url + check.path, None)
        if isinstance(outcome, Failed):
            return outcome
        if outcome.status != 200:
            return Failed(str(outcome), 0.0)
        check.read(outcome)
        self.unchecked.pop(url, None)
        return None

    async def _exchange(self, session: aiohttp.ClientSession, url: str, body: bytes | None) -> Answer | Failed:
        """Return the answer of a server; `Failed` if its status is that of a temporary failure."""
        method, content = "GET" if body is None else "POST", bytearray()
        data = None if body is None else BytesIO(body)  # sent in chunks
        # No redirects: they would turn a POST into a GET. No `trust_env`: it would also send passwords of ~/.netrc.
        async with session.request(method, url, data=data, proxy=proxy_of(url), allow_redirects=False) as response:
            answer = Answer(strip_secrets(url), response.status, response.reason or "", b"")
            async for part in response.content.iter_any():
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise self.unexpected_answer(answer, f"at most {LARGEST_ANSWER} bytes", "more")
            answer = answer._replace(body=bytes(content))
            pause = retry_after(response.headers.get("Retry-After", ""))
            return Failed(str(answer), pause) if answer.is_temporary else answer

    def json_of(self, answer: Answer) -> Any:
        """Return the JSON content of an answer with status 200.

        Raises:
            ConnectionError: if the answer has another status.
            ValueError: if the answer is not JSON.
        """
        if 400 <= answer.status < 500:
            raise ConnectionError(
                f"{self.owner}: {answer.url} must accept the request. Found {answer}. "
                "Correct what the answer names: for 401 the token or key, for 404 the URL."
            )
        if answer.status != 200:
            raise self._failure(answer.url, str(answer))
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:  # includes too many digits and too deep nesting
            raise self.unexpected_answer(answer, "JSON", answer.body[:10_000].decode(errors="replace")) from error

    def _unreachable(self, request: Request, attempts: int, causes: Mapping[str, str]) -> Unreachable:
        urls = [request.url] if request.url else self.urls
        if len(urls) == 1:
            where, found = f"{strip_secrets(urls[0])}{request.path}", causes[urls[0]]
        else:
            where = f"one of {len(urls)} servers"
            found = "; ".join(f"{strip_secrets(url)}{request.path}: {causes.get(url, 'not tried')}" for url in urls)
        error = Unreachable(str(self._failure(where, found, attempts, len(urls))))
        error.attempts = attempts
        return error

    def _failure(self, where: str, cause: str, attempts: int = 1, servers: int = 1) -> ConnectionError:
        return ConnectionError(
            f"{self.owner}: {where} must answer. Found after {attempts} of {servers * (1 + self.retries)} attempts, within "
            f"`deadline`, {self.deadline:g} s: {cause}. Check that the server runs, and read its log; raise `timeout` and "
            "`deadline` if it is slow, `retries` if it restarts."
        )

    def unexpected_answer(self, answer: Answer, expected: str, found: Any) -> ValueError:
        """Return the error for an answer that does not have the expected form."""
        return ValueError(f"{self.owner}: {answer.url} must answer {expected}. Found '{quote(found)}'. {self.remedy}")


def run_in_new_loop(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine in a new thread with a new event loop, because a notebook's thread already runs a loop.

    The thread is a daemon. A signal can interrupt the caller while it waits.
    """
    outcome: Future[Result] = Future()

    async def run() -> None:
        try:
            outcome.set_result(await work())
        except BaseException as error:  # noqa: BLE001 - the caller receives it
            outcome.set_exception(error)

    def in_thread() -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(run())
        except BaseException as error:
            if outcome.done():
                raise
            outcome.set_exception(error)  # no loop could start, for instance because too many files are open

    Thread(target=in_thread, daemon=True).start()
    return outcome.result()
