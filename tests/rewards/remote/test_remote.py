"""RemoteReward, tested with real servers that work, are slow, fail or are unreachable."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch

from rewards import Prompt, RemoteReward
from tests.helpers.remote_scores import PROMPT, expected, ready, score_shades, shades
from tests.helpers.scripted_server import ScriptedServer, remote_reward, score_of


def test_requests_and_scores_follow_the_protocol() -> None:
    prompts = [Prompt("a cat", "plain"), Prompt("two dogs", "geneval", {"include": [{"class": "dog", "count": 2}]})]
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    with ScriptedServer(remote_reward) as server:
        scores = ready(server)(images=images, prompts=prompts)
        (body,) = server.requests
    assert body["prompts"] == [
        {"text": "a cat", "source": "plain", "metadata": {}},
        {"text": "two dogs", "source": "geneval", "metadata": {"include": [{"class": "dog", "count": 2}]}},
    ]
    assert scores.tolist() == pytest.approx(
        [score_of(image, prompt.text) for image, prompt in zip(body["images"], prompts, strict=True)]
    )
    rounded = (images * 255).round().mean((1, 2, 3)) / 255
    assert scores.tolist() == pytest.approx((rounded * 0.8 + torch.tensor([0, 3]) / 20).tolist())


def test_images_are_split_into_requests() -> None:
    with ScriptedServer(remote_reward) as server:
        scores = ready(server, request_size=3)(images=shades(8), prompts=[PROMPT] * 8)
        sizes = Counter(len(body["images"]) for body in server.requests)
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
        (body,) = server.requests
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

    torch.testing.assert_close(score_shades(answer, count=4, request_size=1, concurrency=4), expected(4))


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
        score_shades(lambda body: reply)
    assert "speaks the protocol in `rewards.remote`" in str(caught.value)


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


def test_scoring_inside_a_running_event_loop() -> None:
    """A notebook runs an event loop."""

    async def cell() -> torch.Tensor:
        return score_shades(lambda body: remote_reward("/score", body))

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
    for url in ("me:pass@host", "ftp://me:pass@host", "http://me:pass@host:port", "http://me:a#pass@host"):
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
        (
            {"url": "http://host/v1?key=s3cret"},
            "`url` must have no query.*Found '.*/v1.key=...'. Write it as http://host/v1.",
        ),
        ({"url": "http://host/#top"}, "`url` must have no query, no fragment.* Write it as http://host/."),
        ({"url": "http://host?"}, "`url` must have no query.* Write it as http://host."),
        ({"url": "http://host/score/"}, "`url` must .*no path of a request.*Found '.*score/'. Write it as http://host."),
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


def test_a_host_or_folder_may_have_the_name_of_a_request() -> None:
    for url in ("http://score", "http://score:8000", "http://host/score/v1", "http://host/underscore"):
        assert RemoteReward(f"{url}/").url == url


def test_the_connection_is_not_in_checkpoints() -> None:
    with ScriptedServer(remote_reward) as server:
        assert ready(server).state_dict() == {}
