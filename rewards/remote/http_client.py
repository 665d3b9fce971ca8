"""A JSON client for HTTP: concurrent requests, each with one deadline and a bounded answer size."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BytesIO
from threading import Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp

from rewards.redaction import strip_secrets
from rewards.remote.transport import quote

TRY_AGAIN = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of temporary failures, which are retried."""
LONGEST_PAUSE = 60.0
"""Maximum seconds between two attempts, even if a server's Retry-After is longer."""
LARGEST_ANSWER = 4 * 2**20
"""Maximum bytes of an answer. An answer with the scores of a thousand images has about 25000."""

Result = TypeVar("Result")


class Answer(NamedTuple):
    """A server's answer."""

    path: str
    status: int
    reason: str
    body: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {quote(self.body[:10_000].decode(errors='replace'))}"


class Request(NamedTuple):
    """A request.

    Args:
        path: Path below the client's URL.
        read: Called with the answer as soon as it arrives. It may raise.
        body: Builds the body of a POST, in a thread. None: a GET.
    """

    path: str
    read: Callable[[Answer], Any]
    body: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class JsonClient:
    """Send requests to a server, with retries and a deadline.

    Args:
        owner: Name of the reward, for error messages.
        url: URL of the server, `http` or `https`, as returned by `check_url`.
        remedy: Remedy for an unexpected answer, for error messages.
        concurrency: Maximum number of simultaneous requests, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        deadline: Seconds for a request with all its attempts and the pauses between them, > 0.
        retries: Number of further attempts, >= 0.
        backoff: The first retry is immediate, the second waits twice this many seconds, and each later one waits twice as
            long as the one before, >= 0.
        token: Bearer token. None: no token is sent.

    Raises:
        ValueError: if an argument is out of range.
    """

    owner: str
    url: str
    remedy: str
    concurrency: int
    timeout: float
    deadline: float
    retries: int
    backoff: float = 0.5
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
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
        if self.token is not None and "@" in urlsplit(self.url).netloc:
            raise ValueError(f"{self.owner}: a URL with a user must come without a token. Found both. Remove the user.")

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """Return the results of `Request.read`, in the order of the requests; after a failure no new request starts.

        Raises:
            ConnectionError: if the server is unreachable or too slow, or still answers errors after all attempts.
            ValueError: if an answer is too large.
        """
        return run_in_new_loop(lambda: self._ask(requests))

    async def _ask(self, requests: Sequence[Request]) -> list[Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        slots = asyncio.Semaphore(self.concurrency)
        async with aiohttp.ClientSession(
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small answer may expand to any size
            timeout=aiohttp.ClientTimeout(),  # none: `asyncio.timeout` limits each attempt
            trust_env=True,  # proxies
        ) as session:

            async def send(request: Request) -> Any:
                async with slots:
                    return request.read(await self._send(session, request))

            tasks = [asyncio.ensure_future(send(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, session: aiohttp.ClientSession, request: Request) -> Answer:
        body = await asyncio.to_thread(request.body) if request.body else None
        end, attempts = time.monotonic() + self.deadline, 0
        while True:
            limit, requested_pause = min(self.timeout, end - time.monotonic()), 0.0
            try:
                async with asyncio.timeout(limit):
                    answer, requested_pause = await self._attempt(session, request.path, body)
                if answer.status not in TRY_AGAIN:
                    return answer
                cause = str(answer)
            except TimeoutError:
                cause = f"timed out after {limit:.3g} s"
            except aiohttp.ClientError as error:
                cause = quote(f"{error or type(error).__name__}{_system_error(error)}")
            attempts += 1
            # Random jitter, so that requests that failed together do not retry together.
            pause = 0.0 if attempts == 1 else self.backoff * (2 ** (attempts - 1) + random.random())
            pause = min(max(pause, requested_pause), LONGEST_PAUSE)
            if attempts > self.retries or time.monotonic() + pause >= end:
                raise self.failure(request.path, cause, attempts)
            await asyncio.sleep(pause)

    async def _attempt(self, session: aiohttp.ClientSession, path: str, body: bytes | None) -> tuple[Answer, float]:
        """Send a request once; return the answer and the pause in seconds that it requests (Retry-After)."""
        method, content = "GET" if body is None else "POST", bytearray()
        data = None if body is None else BytesIO(body)  # sent in chunks
        # No redirects: they would turn a POST into a GET.
        async with session.request(method, self.url + path, data=data, allow_redirects=False) as response:
            async for part in response.content.iter_any():
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise self.unexpected_answer(path, f"at most {LARGEST_ANSWER} bytes", "more")
            requested_pause = retry_after(response.headers.get("Retry-After", ""))
            return Answer(path, response.status, response.reason or "", bytes(content)), requested_pause

    def json_of(self, answer: Answer) -> Any:
        """Return the JSON content of an answer with status 200.

        Raises:
            ConnectionError: if the answer has another status.
            ValueError: if the answer is not JSON.
        """
        if answer.status != 200:
            raise self.failure(answer.path, str(answer))
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:  # includes too many digits and too deep nesting
            raise self.unexpected_answer(answer.path, "JSON", answer.body[:10_000].decode(errors="replace")) from error

    @property
    def public_url(self) -> str:
        """The URL without secrets, for messages."""
        return strip_secrets(self.url)

    def failure(self, path: str, cause: str, attempts: int = 1) -> ConnectionError:
        """Return the error for a request without a valid answer."""
        return ConnectionError(
            f"{self.owner}: {self.public_url}{path} must answer. Found after {attempts} of {1 + self.retries} attempts, "
            f"within `deadline`, {self.deadline:g} s: {cause}. Check that the server runs, and read its log; raise "
            "`timeout` and `deadline` if it is slow, `retries` if it restarts."
        )

    def unexpected_answer(self, path: str, expected: str, answer: Any) -> ValueError:
        """Return the error for an answer that does not have the expected form."""
        return ValueError(
            f"{self.owner}: {self.public_url}{path} must answer {expected}. Found '{quote(answer)}'. {self.remedy}"
        )


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

    Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    return outcome.result()


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


def check_url(owner: str, name: str, url: str) -> str:
    """Check the URL of a web server and return it without a trailing slash.

    Raises:
        ValueError: if it is not the URL of a web server.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        public_url = strip_secrets(url if "://" in url else url.rpartition("@")[2])
        raise ValueError(
            f"{owner}: `{name}` must begin with http:// or https:// and name a host. Found '{public_url}'. "
            "Write it as http://host:8000."
        )
    return url.rstrip("/")


def is_token(text: str) -> bool:
    """Whether a text is a valid token for an HTTP header."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_token(owner: str, variable: str | None) -> str | None:
    """Read a bearer token from an environment variable, because others can read files and command lines.

    Args:
        owner: Name of the reward or command, for error messages.
        variable: Name of the variable. None: no token.

    Raises:
        ValueError: if the variable is not set or does not hold a valid token.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not is_token(token):
        content = "another text" if token else "nothing"
        raise ValueError(
            f"{owner}: `token_variable` must name an environment variable with a token, of ASCII letters without spaces. "
            f"Found {content} in {variable}. Set it: export {variable}=$(openssl rand -hex 32)."
        )
    return token


def _system_error(error: aiohttp.ClientError) -> str:
    number = getattr(error, "errno", None) or 0
    return f" ({os.strerror(number)})" if number > 0 else ""
