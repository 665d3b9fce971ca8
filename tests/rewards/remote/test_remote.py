"""RemoteReward, tested with real servers that work, are slow, fail or are unreachable."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rewards import Prompt, RemoteReward
from tests.helpers.scripted_server import CUT, DROP, ScriptedServer, judge, remote_reward

PROMPT = Prompt("a cat", "plain")


def shades(count: int) -> torch.Tensor:
    """Return grey images with 8-bit values, each brighter than the one before."""
    return (torch.arange(count) * 5 / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def expected(count: int, text: str = PROMPT.text) -> torch.Tensor:
    """Return the scores of `shades` by `judge`."""
    return torch.arange(count) * 5 / 255 * 0.8 + len(text) % 5 / 20


def ready(server: ScriptedServer, **arguments: Any) -> RemoteReward:
    reward = RemoteReward(server.url, **{"backoff": 0.01, "retries": 2, "timeout": 5.0, **arguments})
    reward.setup()
    return reward


def scored(answer: Callable[[Any], Any], count: int = 2, **arguments: Any) -> torch.Tensor:
    """Score `count` shades by a server that answers health checks normally and scoring requests by `answer(body)`."""
    with ScriptedServer(lambda path, body: remote_reward(path, body) if body is None else answer(body)) as server:
        return ready(server, **arguments)(images=shades(count), prompts=[PROMPT] * count)


def test_requests_and_scores_follow_the_protocol() -> None:
    prompts = [Prompt("a cat", "plain"), Prompt("two dogs", "geneval", {"include": [{"class": "dog", "count": 2}]})]
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    with ScriptedServer(remote_reward) as server:
        scores = ready(server)(images=images, prompts=prompts)
        (body,) = server.asked
    assert body["prompts"] == [
        {"text": "a cat", "source": "plain", "metadata": {}},
        {"text": "two dogs", "source": "geneval", "metadata": {"include": [{"class": "dog", "count": 2}]}},
    ]
    assert scores.tolist() == pytest.approx(
        [judge(image, prompt.text) for image, prompt in zip(body["images"], prompts, strict=True)]
    )
    rounded = (images * 255).round().mean((1, 2, 3)) / 255
    assert scores.tolist() == pytest.approx((rounded * 0.8 + torch.tensor([0, 3]) / 20).tolist())


def test_images_are_split_into_requests() -> None:
    with ScriptedServer(remote_reward) as server:
        scores = ready(server, request_size=3)(images=shades(8), prompts=[PROMPT] * 8)
        sizes = Counter(len(body["images"]) for body in server.asked)
    assert sizes == {3: 2, 2: 1}
    torch.testing.assert_close(scores, expected(8))


def test_null_is_missing_and_counted() -> None:
    with ScriptedServer(lambda path, body: {"scores": [0.5, None, 3]} if body else {"reward": "Half"}) as server:
        reward = ready(server)
        scores = reward(images=shades(3), prompts=[PROMPT] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.5, torch.nan, 3.0]), equal_nan=True)
    assert reward.missing == 1


def test_only_chosen_sources_are_sent() -> None:
    prompts = [Prompt("one", "plain"), Prompt("two", "text"), Prompt("three", "plain")]
    with ScriptedServer(remote_reward) as server:
        reward = ready(server, sources=["text"])
        scores = reward(images=shades(3), prompts=prompts)
        (body,) = server.asked
    assert [prompt["text"] for prompt in body["prompts"]] == ["two"]
    assert scores.isnan().tolist() == [True, False, True]
    assert reward.missing == 0


def test_concurrency_reaches_but_never_exceeds_its_limit() -> None:
    full = threading.Barrier(3, timeout=5)  # no answer before three requests are in flight

    def answer(body: Any) -> Any:
        full.wait()
        time.sleep(0.02)  # time for a fourth request to arrive, if there is one
        return remote_reward("/score", body)

    with ScriptedServer(lambda path, body: remote_reward(path, body) if body is None else answer(body)) as server:
        scores = ready(server, request_size=1, concurrency=3)(images=shades(12), prompts=[PROMPT] * 12)
        assert server.most_in_flight == 3
    torch.testing.assert_close(scores, expected(12))


def test_order_is_kept_if_answers_arrive_out_of_order() -> None:
    other_answered = threading.Event()

    def answer(body: Any) -> Any:
        reply = remote_reward("/score", body)
        if reply["scores"][0] == 0:  # the first image is black
            assert other_answered.wait(5)
            time.sleep(0.05)
        other_answered.set()
        return reply

    torch.testing.assert_close(scored(answer, count=4, request_size=1, concurrency=4), expected(4))


def test_a_slow_answer_within_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.3)
        return remote_reward("/score", body)

    torch.testing.assert_close(scored(answer, timeout=3.0, retries=0), expected(2))


def test_a_slow_answer_beyond_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.8)
        return remote_reward("/score", body)

    with pytest.raises(ConnectionError, match=r"RemoteReward: http://127.*/score must answer.*timed out.*raise `timeout`"):
        scored(answer, timeout=0.3, retries=1)


@pytest.mark.parametrize(
    "trouble",
    [(500, {}), (502, b""), (503, b""), (504, b""), (429, {}), DROP],
    ids=lambda trouble: "dropped" if trouble is DROP else str(trouble),
)
def test_temporary_failures_are_retried(trouble: Any) -> None:
    replies = iter([trouble, trouble])
    torch.testing.assert_close(scored(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))


def test_permanent_failures_report_the_servers_message() -> None:
    bodies: list[Any] = []

    def answer(body: Any) -> Any:
        bodies.append(body)
        return 500, {"error": "PickScore: CUDA is out of memory."}

    with pytest.raises(
        ConnectionError, match=r"after 3 of 3 attempts, .*: 500 Internal Server Error.*CUDA is out of memory"
    ):
        scored(answer)
    assert len(bodies) == 3


@pytest.mark.parametrize(("status", "error"), [(400, ValueError), (404, ValueError), (301, ConnectionError)])
def test_rejected_requests_are_not_retried(status: int, error: type[Exception]) -> None:
    bodies: list[Any] = []

    def answer(body: Any) -> Any:
        bodies.append(body)
        return status, {"error": "not like this"}

    with pytest.raises(error, match=rf"{status} .*not like this"):
        scored(answer)
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"<html>It works!</html>", r"must answer JSON\. Found '<html>It works!</html>'"),
        (b"", r"must answer JSON\. Found ''"),
        (b'{"scores": ' + b"[" * 100_000, r"must answer JSON\. Found '.\"scores\": \[\[\["),
        (b'{"scores": [' + b"1" * 5000 + b", 2]}", r"must answer JSON\."),
        ([0.1, 0.2], r'must answer \{"scores": .*Found .\[0.1, 0.2\]'),
        ({"score": [0.1, 0.2]}, r'must answer \{"scores": '),
        ({"scores": 0.1}, r'must answer \{"scores": '),
        ({"scores": [0.1]}, "must answer 2 scores for 2 images. Found '1 scores'"),
        ({"scores": [0.1, 0.2, 0.3]}, "Found '3 scores'"),
        ({"scores": [0.1, "0.2"]}, "finite number or null"),
        ({"scores": [0.1, True]}, "finite number or null"),
        ({"scores": [0.1, [0.2]]}, "finite number or null"),
        (b'{"scores": [0.1, NaN]}', "finite number or null"),
        (b'{"scores": [0.1, -Infinity]}', "finite number or null"),
        (b'{"scores": [0.1, 1e39]}', "finite number or null"),  # not a float32
        (b'{"scores": [0.1, 1%s]}' % (b"0" * 400), "finite number or null"),  # not a float
        (b'{"scores": [0.1, 1%s]}' % (b"0" * 5000), "must answer JSON"),  # more digits than Python parses
    ],
    ids=lambda value: repr(value)[:40],
)
def test_unexpected_answers_are_errors(reply: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^RemoteReward: http://127.*/score .*{message}") as caught:
        scored(lambda body: reply)
    assert "speaks the protocol in `rewards.remote`" in str(caught.value)


def test_an_unreachable_server() -> None:
    with ScriptedServer(remote_reward) as server:
        reward = ready(server)
        server.stop()
        with pytest.raises(ConnectionError, match=r"/score must answer.*refused.*Check that the server runs"):
            reward(images=shades(1), prompts=[PROMPT])


def test_a_connection_lost_during_an_answer() -> None:
    with pytest.raises(ConnectionError, match=r"/score must answer.*Check that the server runs"):
        scored(lambda body: CUT)


def test_a_server_that_fails_between_requests() -> None:
    """The server drops all requests after the fifth of twelve."""
    lock, count = threading.Lock(), [0]

    def answer(body: Any) -> Any:
        with lock:
            count[0] += 1
            return DROP if count[0] > 5 else remote_reward("/score", body)

    with pytest.raises(ConnectionError, match="/score must answer"):
        scored(answer, count=12, request_size=1, retries=1)
    assert count[0] <= 5 + 4 * 2 + 4 * 2  # attempts of four concurrent requests, and requests started before the first error


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ({"status": "ok"}, ValueError, r'/health must answer \{"reward": name\}'),
        (b"ok", ValueError, r"/health must answer JSON\. Found 'ok'"),
        ((404, b"no such page"), ConnectionError, "404 Not Found: no such page"),
    ],
)
def test_setup_refuses_another_kind_of_server(reply: Any, error: type[Exception], message: str) -> None:
    with ScriptedServer(lambda path, body: reply) as server, pytest.raises(error, match=message):
        ready(server)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"


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
        scored(lambda body: answer(), timeout=0.4, deadline=0.6, retries=100)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("wait", ["3600", "Thu, 01 Jan 2093 00:00:00 GMT"])
def test_long_pauses_of_a_server_are_limited(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = f"HTTP/1.1 503 Busy\r\nRetry-After: {wait}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    replies = iter([iter([busy])])
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="after 1 of 3 attempts, within `deadline`, 1 s: 503 Busy"):
        scored(lambda body: iter([busy]), deadline=1)
    assert time.monotonic() - start < 1
    monkeypatch.setattr("rewards.remote.http_client.LONGEST_PAUSE", 0.3)
    torch.testing.assert_close(scored(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))
    assert 0.3 < time.monotonic() - start < 2


def test_retry_after_is_respected() -> None:
    replies = iter([iter([b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"])])
    start = time.monotonic()
    torch.testing.assert_close(scored(lambda body: next(replies, None) or remote_reward("/score", body)), expected(2))
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
        scored(lambda body: endless())
    assert len(chunks) < 50  # includes data in socket buffers


def test_a_compressed_answer_is_not_expanded() -> None:
    bomb = gzip.compress(b" " * 10**6)
    reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
    with pytest.raises(ValueError, match="/score must answer JSON"):
        scored(lambda body: iter([reply]))


def test_waiting_for_scores_can_be_interrupted() -> None:
    """Python runs signal handlers in the main thread, which must not block while a server is slow."""

    def handler(*_: Any) -> None:
        raise InterruptedError

    old = signal.signal(signal.SIGUSR1, handler)
    start = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            scored(lambda body: os.kill(os.getpid(), signal.SIGUSR1) or slowly(HEAD + b" " * 100))
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert time.monotonic() - start < 2


def test_scoring_inside_a_running_event_loop() -> None:
    """A notebook runs an event loop."""

    async def cell() -> torch.Tensor:
        return scored(lambda body: remote_reward("/score", body))

    torch.testing.assert_close(asyncio.run(cell()), expected(2))


def test_a_password_in_the_url_is_used_and_not_shown() -> None:
    with ScriptedServer(remote_reward) as server:
        reward = RemoteReward(server.url.replace("://", "://me:pass@"), retries=0)
        reward.setup()
        reward(images=shades(1), prompts=[PROMPT])
        assert server.headers[-1]["Authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()
        server.stop()
        with pytest.raises(ConnectionError, match=r"RemoteReward: http://127") as error:
            reward(images=shades(1), prompts=[PROMPT])
    assert "pass" not in str(error.value)
    for url in ("me:pass@host", "ftp://me:pass@host", "http://me:pass@host:port"):
        with pytest.raises(ValueError, match="Found '.*host") as error:
            RemoteReward(url)
        assert "pass" not in str(error.value)


def test_setup_refuses_an_unreachable_server() -> None:
    with ScriptedServer(remote_reward) as server:
        server.stop()
        with pytest.raises(ConnectionError, match="/health must answer.*refused"):
            ready(server)


def test_metadata_must_be_json() -> None:
    prompt = Prompt("a cat", "plain", {"box": torch.zeros(4)})
    with ScriptedServer(remote_reward) as server, pytest.raises(TypeError, match="`metadata` must be JSON.*Tensor"):
        ready(server)(images=shades(1), prompts=[prompt])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "`url` must begin with http:// or https:// and name a host. Found 'localhost:8000'"),
        ({"sources": []}, "`sources` must be a list that names a prompt set"),
        ({"request_size": 0}, "`request_size` must be >= 1. Found 0"),
        ({"concurrency": 0}, "`concurrency` must be >= 1. Found 0"),
        ({"deadline": 0}, "`deadline` must be > 0 seconds. Found 0"),
        ({"timeout": 0}, "`timeout` must be > 0 seconds. Found 0"),
        ({"retries": -1}, "`retries` must be >= 0. Found -1"),
        ({"backoff": -0.1}, "`backoff` must be >= 0 seconds"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RemoteReward: {message}"):
        RemoteReward(**{"url": "http://localhost:8000", **arguments})


def test_the_connection_is_not_in_checkpoints() -> None:
    with ScriptedServer(remote_reward) as server:
        assert ready(server).state_dict() == {}
