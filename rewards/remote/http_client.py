"""Asking a server that speaks JSON: several requests in flight, each within one deadline, with answers of bounded size."""

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
"""Statuses that may be over soon."""
LONGEST_PAUSE = 60.0
"""Most seconds between two tries, whatever a server's Retry-After says."""
LARGEST_ANSWER = 4 * 2**20
"""Bytes of an answer; one with the scores of a thousand images has some 25000."""

Result = TypeVar("Result")


class Answer(NamedTuple):
    """What a server answered to a request that needs no further try."""

    path: str
    status: int
    reason: str
    body: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {quote(self.body[:10_000].decode(errors='replace'))}"


class Request(NamedTuple):
    """What is asked: a path below the client's URL; what looks at the answer as soon as it is there, and may raise; what
    makes the body of a POST, in a thread. None: a GET."""

    path: str
    read: Callable[[Answer], Any]
    body: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class JsonClient:
    """Asks a server, again where it fails, for no longer than it may.

    Args:
        owner: name of the reward, for error messages.
        url: of the server, `http` or `https`, as `check_url` gives it.
        remedy: what to do where a server answers something else than it should, for error messages.
        concurrency: requests in flight at once, >= 1.
        timeout: seconds for one try, from connecting to the answer's last byte, > 0.
        deadline: seconds for a request with all its tries and the pauses between them, > 0.
        retries: further tries, >= 0.
        backoff: the second further try waits twice this many seconds, each next twice as long as the last, >= 0.
        token: sent as a bearer token. None: none.

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
            ("concurrency", 1, "It counts requests in flight"),
            ("retries", 0, "0 gives up at the first failure"),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{self.owner}: `{name}` must be >= {low}. Found {getattr(self, name)}. {use}.")
        for name, use in (
            ("timeout", "Allow for the slowest answer"),
            ("deadline", "Allow for all tries of a request; .inf for no end"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.owner}: `{name}` must be > 0 seconds. Found {getattr(self, name)}. {use}.")
        if not self.backoff >= 0:
            raise ValueError(
                f"{self.owner}: `backoff` must be >= 0 seconds. Found {self.backoff}. 0.5 is gentle to a server."
            )
        if self.token is not None and not is_token(self.token):
            raise ValueError(f"{self.owner}: a token or key must be ASCII letters without spaces. Found others. Look at it.")
        if self.token is not None and "@" in urlsplit(self.url).netloc:
            raise ValueError(f"{self.owner}: a URL with a user must come without a token. Found both. Keep the token.")

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """What was read of the answers, in the order of the requests; after a failure nothing new begins.

        Raises:
            ConnectionError: if the server is gone or too slow, or still answers errors after all tries.
            ValueError: if an answer is too large.
        """
        return in_own_loop(lambda: self._ask(requests))

    async def _ask(self, requests: Sequence[Request]) -> list[Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        places = asyncio.Semaphore(self.concurrency)
        async with aiohttp.ClientSession(
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small answer may expand to any size
            timeout=aiohttp.ClientTimeout(),  # ours are around it
            trust_env=True,  # proxies
        ) as session:

            async def one(request: Request) -> Any:
                async with places:
                    return request.read(await self._one(session, request))

            tasks = [asyncio.ensure_future(one(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, session: aiohttp.ClientSession, request: Request) -> Answer:
        body = await asyncio.to_thread(request.body) if request.body else None
        end, tried = time.monotonic() + self.deadline, 0
        while True:
            limit, asked_for = min(self.timeout, end - time.monotonic()), 0.0
            try:
                async with asyncio.timeout(limit):
                    answer, asked_for = await self._once(session, request.path, body)
                if answer.status not in TRY_AGAIN:
                    return answer
                said = str(answer)
            except TimeoutError:
                said = f"timed out after {limit:.3g} s"
            except aiohttp.ClientError as error:
                said = quote(f"{error or type(error).__name__}{_why(error)}")
            tried += 1
            pause = 0.0 if tried == 1 else self.backoff * (2 ** (tried - 1) + random.random())  # those that failed together
            pause = min(max(pause, asked_for), LONGEST_PAUSE)  # come back apart
            if tried > self.retries or time.monotonic() + pause >= end:
                raise self.failure(request.path, said, tried)
            await asyncio.sleep(pause)

    async def _once(self, session: aiohttp.ClientSession, path: str, body: bytes | None) -> tuple[Answer, float]:
        """An answer, and the seconds that it asks to wait for another."""
        method, found = "GET" if body is None else "POST", bytearray()
        data = None if body is None else BytesIO(body)  # sent piece by piece
        # a redirected POST would turn into a GET
        async with session.request(method, self.url + path, data=data, allow_redirects=False) as response:
            async for part in response.content.iter_any():
                found += part
                if len(found) > LARGEST_ANSWER:
                    raise self.garbage(path, f"at most {LARGEST_ANSWER} bytes", "more")
            asked_for = retry_after(response.headers.get("Retry-After", ""))
            return Answer(path, response.status, response.reason or "", bytes(found)), asked_for

    def json_of(self, answer: Answer) -> Any:
        """What an answer of status 200 says.

        Raises:
            ConnectionError: if it has another status.
            ValueError: if it is no JSON.
        """
        if answer.status != 200:
            raise self.failure(answer.path, str(answer))
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:  # too many digits, or levels, too
            raise self.garbage(answer.path, "JSON", answer.body[:10_000].decode(errors="replace")) from error

    @property
    def shown(self) -> str:
        """The URL without what is secret in it."""
        return strip_secrets(self.url)

    def failure(self, path: str, said: str, tries: int = 1) -> ConnectionError:
        """A server that does not do what it is asked."""
        return ConnectionError(
            f"{self.owner}: {self.shown}{path} must answer. Found after {tries} of {1 + self.retries} tries, "
            f"within `deadline`, {self.deadline:g} s: {said}. See that the server runs and what its log says; raise "
            "`timeout` and `deadline` if it is slow, `retries` if it restarts."
        )

    def garbage(self, path: str, expected: str, found: Any) -> ValueError:
        """A server that answers something else."""
        return ValueError(f"{self.owner}: {self.shown}{path} must answer {expected}. Found '{quote(found)}'. {self.remedy}")


def in_own_loop(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """What a coroutine returns, run in a thread of its own: a notebook's thread has a loop already.

    The thread is a daemon, and who waits for it can be interrupted by a signal.
    """
    outcome: Future[Result] = Future()

    async def told() -> None:
        try:
            outcome.set_result(await work())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            outcome.set_exception(error)

    Thread(target=lambda: asyncio.run(told()), daemon=True).start()
    return outcome.result()


def retry_after(header: str) -> float:
    """Seconds that a Retry-After asks for, a number or a date; 0 where it is neither.

    >>> retry_after("5"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), retry_after("-1"), retry_after("nan")
    (5.0, 0.0, 0.0, 0.0)
    """
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without its zone
        return 0.0


def check_url(owner: str, name: str, url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ValueError: if it is none of a web server.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        shown = strip_secrets(url if "://" in url else url.rpartition("@")[2])
        raise ValueError(
            f"{owner}: `{name}` must begin with http:// or https:// and name a host. Found '{shown}'. "
            "Write it as http://host:8000."
        )
    return url.rstrip("/")


def is_token(text: str) -> bool:
    """Whether a header can carry it."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_token(owner: str, variable: str | None) -> str | None:
    """The bearer token that an environment variable holds: what stands in a file or a command line is read by others.

    Args:
        owner: who needs it, for error messages.
        variable: its name. None: no token.

    Raises:
        ValueError: if it is not set, or holds something that is no token.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not is_token(token):
        found = "another text" if token else "nothing"
        raise ValueError(
            f"{owner}: `token_variable` must name an environment variable with a token, of ASCII letters without spaces. "
            f"Found {found} in {variable}. Set it: export {variable}=$(openssl rand -hex 32)."
        )
    return token


def _why(error: aiohttp.ClientError) -> str:
    number = getattr(error, "errno", None) or 0
    return f" ({os.strerror(number)})" if number > 0 else ""
