"""Several servers of one reward: the least busy one is asked, and one that fails is left out."""

from __future__ import annotations

import itertools
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from rewards import JPEGCompressibility, Prompt, RemoteReward, VisionLanguageReward
from rewards.remote.replicas import Replicas
from tests.helpers.remote_scores import PROMPT, expected, shades
from tests.helpers.reward_server import serve_reward
from tests.helpers.scripted_server import DROP, MODEL, ScriptedServer, chat, completion, remote_reward

URLS = ["http://a", "http://b", "http://c"]


def least_busy(replicas: Replicas, **busy: int) -> set[str]:
    return {replicas.choose(Counter({f"http://{name}": count for name, count in busy.items()})) for _ in range(50)}


def test_the_least_busy_one_is_chosen_by_chance_among_equals() -> None:
    assert least_busy(Replicas(URLS), a=2, b=1, c=1) == {"http://b", "http://c"}


def test_one_that_failed_is_left_out_and_then_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.replicas.REST", 0.1)
    replicas = Replicas(URLS)
    assert replicas.failed("http://a", "refused") and not replicas.failed("http://a", "refused")
    assert least_busy(replicas, b=1, c=1) == {"http://b", "http://c"}
    time.sleep(0.15)
    assert [replicas.choose(Counter({"http://b": 1, "http://c": 1})) == "http://a" for _ in range(3)] == [True, False, False]
    assert replicas.works("http://a") and not replicas.works("http://a")
    assert least_busy(replicas, b=1, c=1) == {"http://a"}


def test_if_all_failed_the_one_that_rests_no_longer_is_first() -> None:
    replicas = Replicas(URLS)
    for url, rest in zip(URLS, (0.0, 5.0, 50.0), strict=True):
        replicas.failed(url, "busy", rest)
    assert [replicas.choose(Counter()) for _ in range(3)] == ["http://b", "http://a", "http://b"]


def test_failures_are_not_pickled() -> None:
    replicas = Replicas(URLS)
    replicas.failed("http://a", "refused")
    assert "http://a" in least_busy(pickle.loads(pickle.dumps(replicas)), b=1, c=1)


@pytest.fixture
def serve() -> Iterator[Callable[..., list[ScriptedServer]]]:
    """Start servers with these answers to scoring requests."""
    with ExitStack() as stack:

        def start(*answers: Callable[[Any], Any]) -> list[ScriptedServer]:
            def answer(reply: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
                return lambda path, body: remote_reward(path, body) if body is None else reply(body)

            return [stack.enter_context(ScriptedServer(answer(reply))) for reply in answers]

        yield start


def score(body: Any) -> Any:
    return remote_reward("/score", body)


def replicated(servers: list[ScriptedServer], **arguments: Any) -> RemoteReward:
    options = {"backoff": 0.01, "retries": 1, "timeout": 5.0, "request_size": 1, **arguments}
    reward = RemoteReward([server.url for server in servers], **options)
    reward.setup()
    return reward


def test_requests_are_shared_and_the_order_of_scores_is_kept(serve: Any) -> None:
    """A slow server has no more than two of four simultaneous requests, since the others are less busy."""
    answered, most_answered = itertools.count(1), threading.Event()

    def slowly(body: Any) -> Any:
        assert most_answered.wait(5)
        return score(body)

    def quickly(body: Any) -> Any:
        if next(answered) == 18:
            most_answered.set()
        return score(body)

    servers = serve(slowly, quickly, quickly)
    scores = replicated(servers)(images=shades(24), prompts=[PROMPT] * 24)
    torch.testing.assert_close(scores, expected(24))
    requests = [len(server.requests) for server in servers]
    assert sum(requests) == 24 and requests[0] <= 6 and min(requests[1:]) >= 1


def test_one_that_is_killed_in_the_middle_of_a_batch(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    started, killed = threading.Event(), threading.Event()

    def hangs(body: Any) -> Any:
        started.set()
        assert killed.wait(5)
        return DROP

    first, second = serve(hangs, score)
    reward = replicated([first, second])

    def kill() -> None:
        started.wait(5)
        first.stop()
        killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    for _ in range(2):
        torch.testing.assert_close(reward(images=shades(12), prompts=[PROMPT] * 12), expected(12))
    thread.join()
    assert 1 <= len(first.requests) <= 4 and len(second.requests) == 24
    assert caplog.text.count(f"RemoteReward: {first.url} is left out, because it failed: ") == 1


def test_one_that_is_back_gets_requests_again(serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("rewards.remote.replicas.REST", 0.1)
    caplog.set_level(logging.INFO)
    broken = [(503, b"")]
    servers = serve(lambda body: broken[0] if broken else score(body), score)
    reward = replicated(servers)
    reward(images=shades(8), prompts=[PROMPT] * 8)
    broken.clear()
    time.sleep(0.1)
    reward(images=shades(8), prompts=[PROMPT] * 8)
    assert f"RemoteReward: {servers[0].url} answers again." in caplog.text


def test_an_error_names_all_with_their_causes(serve: Any) -> None:
    servers = serve(lambda body: (503, {"error": "no memory"}), lambda body: DROP)
    secret = [server.url.replace("://", "://me:pass@") for server in servers]
    reward = RemoteReward(secret, retries=1, backoff=0.01)
    reward.setup()
    with pytest.raises(
        ConnectionError, match=r"^RemoteReward: one of 2 servers must answer. Found after 4 of 4 att"
    ) as error:
        reward(images=shades(1), prompts=[PROMPT])
    for server, cause in zip(servers, ("503 Service Unavailable: .*no memory", "Server disconnected"), strict=True):
        assert error.match(rf"{server.url}/score: {cause}")
    assert "pass" not in str(error.value)
    for server in servers:
        server.stop()
    with pytest.raises(ConnectionError, match=r"one of 2 servers must answer. Found after 4 of 4.*refused.*; http.*refused"):
        replicated(servers)


def test_an_error_names_those_that_a_request_has_tried_although_others_succeed(serve: Any) -> None:
    """The first image fails at both servers, and other images are scored there."""

    def answer(body: Any) -> Any:
        black = score(body)["scores"][0] == len(PROMPT.text) % 5 / 20
        return (500, {"error": "black"}) if black else score(body)

    reward = replicated(serve(answer, answer), retries=0)
    with pytest.raises(ConnectionError, match=r"2 of 2 attempts.*/score: 500 .*black.*; http.*/score: 500 .*black"):
        reward(images=shades(6), prompts=[PROMPT] * 6)


def test_one_that_is_unreachable_at_the_start_is_checked_before_it_is_used(serve: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("rewards.remote.replicas.REST", 0.05)
    health: list[Any] = [(503, b"")]

    def answer(path: str, body: Any) -> Any:
        return health[0] if body is None else score(body)

    with ScriptedServer(answer) as late:
        reward = replicated([late, *serve(score)])
        health[0] = {"reward": "Scripted"}
        time.sleep(0.1)
        reward(images=shades(8), prompts=[PROMPT] * 8)
        assert late.requests
        health[0] = (503, b"")
        reward = replicated([late, *serve(score)])
        health[0] = {"reward": "Another"}
        time.sleep(0.1)
        with pytest.raises(
            ValueError, match=r"must serve one reward. Found Another at http.*/health and Scripted at http.*/health"
        ):
            reward(images=shades(8), prompts=[PROMPT] * 8)


def test_one_that_refuses_a_late_check_is_left_out(serve: Any, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr("rewards.remote.replicas.REST", 0.05)
    health: list[Any] = [(503, b"")]
    with ScriptedServer(lambda path, body: health[0] if body is None else score(body)) as late:
        reward = replicated([late, *serve(score)])
        for status in (401, 404):
            health[0] = (status, b"not yet")
            time.sleep(0.06)
            torch.testing.assert_close(reward(images=shades(8), prompts=[PROMPT] * 8), expected(8))
        assert not late.requests
        assert reward._client.replicas is not reward._ready.replicas
        assert reward._ready.replicas.causes()[late.url].startswith("404 Not Found: not yet")
        health[0] = {"reward": "Scripted"}
        time.sleep(0.06)
        reward(images=shades(8), prompts=[PROMPT] * 8)
        assert late.requests


def test_servers_with_other_settings_of_a_reward_are_refused() -> None:
    """The error names the odd one and its setting, whichever of them answers first."""
    with ExitStack() as stack:
        start = lambda quality: stack.enter_context(serve_reward(JPEGCompressibility(quality)))  # noqa: E731
        urls = [start(80), start(80), start(95)]
        RemoteReward(urls[:2]).setup()
        with pytest.raises(ValueError, match=r"must serve one reward with the same settings\. Found ") as error:
            RemoteReward(urls).setup()
        assert f"quality 95 at {urls[2]}/health" in str(error.value)
        assert any(f"quality 80 at {url}/health" in str(error.value) for url in urls[:2])


def test_servers_without_an_identity_are_not_compared(serve: Any) -> None:
    def health(identity: Any) -> Any:
        return lambda path, body: {"reward": "Scripted", "identity": identity} if body is None else score(body)

    with ScriptedServer(health({"size": "1"})) as one, ScriptedServer(health(None)) as other:
        replicated([one, other, *serve(score)])
    with ScriptedServer(health("size 1")) as wrong, pytest.raises(ValueError, match='must answer .*an object "identity"'):
        replicated([wrong])


def test_vision_language_models_are_replicated_too() -> None:
    def answer(path: str, body: Any) -> Any:
        return completion("Score: 5") if body else chat(path, body)

    with ScriptedServer(answer) as first, ScriptedServer(answer) as second:
        urls = [server.url + "/v1" for server in (first, second)]
        reward = VisionLanguageReward("{prompt}?", r"Score: (\d+)", 0, 10, MODEL, urls, concurrency=2)
        reward.setup()
        assert reward(images=shades(8), prompts=[Prompt("a cat", "plain")] * 8).tolist() == [0.5] * 8
        assert first.requests and second.requests


def test_urls_are_kept_as_they_are_given() -> None:
    assert RemoteReward("http://a/").url == "http://a" and RemoteReward(["http://a/"]).url == ["http://a"]
    assert RemoteReward(["http://me:pass@a", "http://b"]).identity["url"] == "['http://a', 'http://b']"
    for urls in ([], ["http://a", "http://a/"]):
        with pytest.raises(ValueError, match=r"RemoteReward: `url` must be a URL, or a list with each server once. Found"):
            RemoteReward(urls)
    with pytest.raises(ValueError, match=r"`url` must begin with .*Found 'b'"):
        RemoteReward(["http://a", "b"])
