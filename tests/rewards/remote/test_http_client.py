"""Slow, lost, temporary and unlimited answers of a server: time limits, retries and size limits."""

from __future__ import annotations

import base64
import errno
import gzip
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from rewards import RemoteReward
from rewards.remote.http_client import LONGEST_PAUSE, JsonClient
from tests.helpers.remote_scores import PROMPT, expected, ready, score_shades, shades
from tests.helpers.scripted_server import CUT, DROP, ScriptedServer, remote_reward

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"


def test_a_slow_answer_within_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.3)
        return remote_reward("/score", body)

    torch.testing.assert_close(score_shades(answer, timeout=3.0, retries=0), expected(2))


def test_a_slow_answer_beyond_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.8)
        return remote_reward("/score", body)

    with pytest.raises(ConnectionError, match=r"RemoteReward: http://127.*/score must answer.*timed out.*raise `timeout`"):
        score_shades(answer, timeout=0.3, retries=1)


@pytest.mark.parametrize(
    "trouble",
    [(500, {}), (502, b""), (503, b""), (504, b""), (522, b""), (408, b""), (429, {}), DROP],
    ids=lambda trouble: "dropped" if trouble is DROP else str(trouble),
)
def test_temporary_failures_are_retried(trouble: Any) -> None:
    replies = iter([trouble, trouble])
    torch.testing.assert_close(score_shades(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))


def test_permanent_failures_report_the_servers_message() -> None:
    bodies: list[Any] = []

    def answer(body: Any) -> Any:
        bodies.append(body)
        return 500, {"error": "PickScore: CUDA is out of memory."}

    with pytest.raises(
        ConnectionError, match=r"after 3 of 3 attempts, .*: 500 Internal Server Error.*CUDA is out of memory"
    ):
        score_shades(answer)
    assert len(bodies) == 3


@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [(status, ValueError, "Fix the prompts") for status in (400, 413, 415, 422)]
    + [(status, ConnectionError, "Correct what the answer names") for status in (401, 403, 404, 405)]
    + [(status, ConnectionError, "Check that the server runs") for status in (301, 501, 505)],
)
def test_rejected_requests_are_not_retried(status: int, error: type[Exception], remedy: str) -> None:
    """Only an error in the content of a request may depend on an image; connection errors are not repeated for each."""
    bodies: list[Any] = []

    def answer(body: Any) -> Any:
        bodies.append(body)
        return status, {"error": "not like this"}

    with pytest.raises(error, match=rf"{status} .*not like this.*{remedy}"):
        score_shades(answer)
    assert len(bodies) == 1


def test_an_unreachable_server() -> None:
    with ScriptedServer(remote_reward) as server:
        reward = ready(server)
        server.stop()
        with pytest.raises(ConnectionError, match=r"/score must answer.*refused.*Check that the server runs"):
            reward(images=shades(1), prompts=[PROMPT])


def test_a_connection_lost_during_an_answer() -> None:
    with pytest.raises(ConnectionError, match=r"/score must answer.*Check that the server runs"):
        score_shades(lambda body: CUT)


def test_a_server_that_fails_between_requests() -> None:
    """The server drops all requests after the fifth of twelve."""
    lock, count = threading.Lock(), [0]

    def answer(body: Any) -> Any:
        with lock:
            count[0] += 1
            return DROP if count[0] > 5 else remote_reward("/score", body)

    with pytest.raises(ConnectionError, match="/score must answer"):
        score_shades(answer, count=12, request_size=1, retries=1)
    assert count[0] <= 5 + 4 * 2 + 4 * 2  # attempts of four concurrent requests, and requests started before the first error


def test_pauses_have_a_limit_after_any_number_of_attempts() -> None:
    client = JsonClient("Mine", ["http://a"], "", concurrency=1, timeout=1, deadline=1, retries=0)
    assert [client._backoff(rounds, 0.0) for rounds in (1, 100, 5000)] == [0.0, LONGEST_PAUSE, LONGEST_PAUSE]


def test_more_than_a_hundred_simultaneous_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.scripted_server.Server.request_queue_size", 200)
    full = threading.Barrier(120, timeout=10)  # no answer before all requests have arrived

    def answer(path: str, body: Any) -> Any:
        if body is not None:
            full.wait()
        return remote_reward(path, body)

    with ScriptedServer(answer) as server:
        reward = ready(server, request_size=1, concurrency=120, retries=0, timeout=20.0)
        reward(images=shades(1).expand(120, 3, 4, 4), prompts=[PROMPT] * 120)
        assert server.most_in_flight == 120


def slowly(text: bytes) -> Iterator[bytes]:
    """Yield one byte at a time, each faster than a timeout per read."""
    for byte in text:
        yield bytes([byte])
        time.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: slowly(HEAD + b" " * 1000),
        lambda: itertools.chain([HEAD], slowly(b" " * 1000)),
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], (b"X: y\r\n" for _ in slowly(b" " * 1000))),
        lambda: slowly(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        lambda: (503, b""),
    ],
    ids=["headers", "body", "endless headers", "continue", "busy"],
)
def test_one_deadline_for_headers_body_and_attempts(answer: Callable[[], Any]) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="within `deadline`, 0.6 s: (timed out|503 Service)"):
        score_shades(lambda body: answer(), timeout=0.4, deadline=0.6, retries=100)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("wait", ["3600", "Thu, 01 Jan 2093 00:00:00 GMT"])
def test_long_pauses_of_a_server_are_limited(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = f"HTTP/1.1 503 Busy\r\nRetry-After: {wait}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    replies = iter([iter([busy])])
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="after 1 of 3 attempts, within `deadline`, 1 s: 503 Busy"):
        score_shades(lambda body: iter([busy]), deadline=1)
    assert time.monotonic() - start < 1
    monkeypatch.setattr("rewards.remote.http_client.LONGEST_PAUSE", 0.3)
    torch.testing.assert_close(score_shades(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))
    assert 0.3 < time.monotonic() - start < 2


def test_retry_after_is_respected() -> None:
    replies = iter([iter([b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"])])
    start = time.monotonic()
    torch.testing.assert_close(score_shades(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))
    assert time.monotonic() - start > 1


@pytest.mark.parametrize("head", [HEAD, b"HTTP/1.1 500 No\r\n\r\n"], ids=["declared", "without a length"])
def test_too_large_answers_are_not_read_completely(head: bytes) -> None:
    chunks = []

    def endless() -> Iterator[bytes]:
        yield head
        for _ in range(100):
            chunks.append(1)
            yield b" " * 2**20

    with pytest.raises(ValueError, match="/score must answer at most 4194304 bytes. Found 'more'"):
        score_shades(lambda body: endless())
    assert len(chunks) < 50  # includes data in socket buffers


def test_a_compressed_answer_is_not_expanded() -> None:
    bomb = gzip.compress(b" " * 10**6)
    reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
    with pytest.raises(ValueError, match="/score must answer JSON"):
        score_shades(lambda body: iter([reply]))


def test_waiting_for_scores_can_be_interrupted() -> None:
    """Python runs signal handlers in the main thread, which must not block while a server is slow."""

    def handler(*_: Any) -> None:
        raise InterruptedError

    old = signal.signal(signal.SIGUSR1, handler)
    start = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            score_shades(lambda body: os.kill(os.getpid(), signal.SIGUSR1) or slowly(HEAD + b" " * 100))
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert time.monotonic() - start < 2


@pytest.mark.timeout(10)
def test_an_event_loop_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with ScriptedServer(remote_reward) as server:
        reward = ready(server)
        monkeypatch.setattr("asyncio.events.new_event_loop", fail)
        with pytest.raises(OSError, match="Too many open files"):
            reward(images=shades(1), prompts=[PROMPT])


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(("variable", "sent"), [(None, None), ("MINE", "Bearer s3cret")])
def test_passwords_of_netrc_are_not_sent(
    variable: str | None, sent: str | None, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login me password pass\n")
    environment.setenv("NETRC", str(tmp_path / "netrc"))
    environment.setenv("MINE", "s3cret")
    with ScriptedServer(remote_reward) as server:
        ready(server, token_variable=variable)(images=shades(1), prompts=[PROMPT])
        assert server.headers[-1]["Authorization"] == sent


def test_a_proxy_of_the_environment_is_used(environment: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def answer(path: str, body: Any) -> Any:
        paths.append(path)
        return remote_reward(urlsplit(path).path, body)

    with ScriptedServer(answer) as proxy:
        environment.setenv("http_proxy", proxy.url.replace("://", "://me:pass@"))
        reward = RemoteReward("http://scores.invalid", retries=0)
        reward.setup()
        torch.testing.assert_close(reward(images=shades(2), prompts=[PROMPT] * 2), expected(2))
        assert paths == ["http://scores.invalid/health", "http://scores.invalid/score"]
        assert proxy.headers[-1]["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()
        proxy.stop()
        with pytest.raises(ConnectionError, match="http://scores.invalid/score must answer.*refused") as error:
            reward(images=shades(1), prompts=[PROMPT])
    assert "pass" not in str(error.value)


def test_servers_in_no_proxy_are_asked_directly(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("http_proxy", "http://127.0.0.1:1")
    environment.setenv("no_proxy", "localhost,127.0.0.1")
    torch.testing.assert_close(score_shades(lambda body: remote_reward("/score", body)), expected(2))
