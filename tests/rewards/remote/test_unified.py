"""UnifiedReward, tested with real local servers with OpenAI's interface that work, are slow, fail or are unreachable."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import Prompt, UnifiedReward
from tests.helpers.scripted_server import CUT, DROP, MODEL, ScriptedServer, chat, completion

PROMPT = Prompt("a cat", "plain")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def shades(count: int) -> torch.Tensor:
    """Return grey images with 8-bit values, each brighter than the one before."""
    return (torch.arange(count) * 5 / 255).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def expected(count: int) -> torch.Tensor:
    """Return one fifth of the ratings of `shades` by `chat`, which have four decimals."""
    return (1 + 4 * (torch.arange(count) * 5 / 255 * 0.8)).mul(1e4).round().div(1e4) / 5


def ready(server: ScriptedServer, **arguments: Any) -> UnifiedReward:
    reward = UnifiedReward(server.url + "/v1", **{"retries": 2, "timeout": 5.0, "size": 16, **arguments})
    reward.setup()
    return reward


def score_shades(answer: Callable[[Any], Any], count: int = 2, **arguments: Any) -> torch.Tensor:
    """Score `count` shades by a server that lists models normally and answers rating requests by `answer(body)`."""
    with ScriptedServer(lambda path, body: chat(path, body) if body is None else answer(body)) as server:
        return ready(server, **arguments)(images=shades(count), prompts=[PROMPT] * count)


def rate(body: Any) -> Any:
    return chat("/v1/chat/completions", body)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 0.8),
        ("Final Score: 3.25", 0.65),
        ("Good.\nFinal Score:\n5", 1.0),
        ("Final Score:1.", 0.2),
        ("Final Score: 2/5", 0.4),
        ("Final Score: 3, not Final Score: 4", 0.6),  # the first counts
        ("", None),
        ("The score is 4.", None),
        ("final score: 4", None),
        ("Final Score: four", None),
        ("Final Score: 0", None),
        ("Final Score: 6", None),
        ("Final Score: 10", None),  # must not be read as 1
        ("Final Score: 5.5", None),  # off the scale
        ("Final Score: -3", None),
    ],
)
def test_final_score(answer: str, score: float | None) -> None:
    assert UnifiedReward().parse_answer(answer) == pytest.approx(torch.nan if score is None else score, nan_ok=True)


def test_requests_follow_openais_interface() -> None:
    image = torch.zeros(1, 3, 6, 10)
    image[:, 0] = 1  # red
    with ScriptedServer(chat) as server:
        scores = ready(server, size=64)(images=image, prompts=[Prompt("a {caption} in braces", "plain")])
        (body,) = server.requests
    assert body["model"] == MODEL
    assert body["temperature"] == 0
    (message,) = body["messages"]
    assert message["role"] == "user"
    image_part, question = message["content"]
    assert question["text"].endswith("\nText caption: a {caption} in braces")
    assert '"Final Score: X"' in question["text"]
    kind, _, png = image_part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(png)))
    assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", (64, 64))
    assert (np.asarray(decoded) == (255, 0, 0)).all()
    assert scores.item() == pytest.approx((1 + 4 * (0.8 / 3 + len("a {caption} in braces") % 5 / 20)) / 5, abs=1e-4)


def test_the_published_defaults() -> None:
    reward = UnifiedReward()
    assert (reward.model, reward.size) == (MODEL, 512)
    for part in ("Alignment", "quality", "1 (worst) to 5 (best)", "{caption}"):
        assert part in reward.question


def test_a_custom_question() -> None:
    with ScriptedServer(chat) as server:
        ready(server, question="Is it {caption}? Final Score: 1 to 5.")(images=shades(1), prompts=[PROMPT])
        (body,) = server.requests
    assert body["messages"][0]["content"][1]["text"] == "Is it a cat? Final Score: 1 to 5."


@pytest.mark.parametrize(
    ("argument", "variable", "sent"), [("a", "b", "Bearer a"), (None, "b", "Bearer b"), (None, "", None)]
)
def test_the_key(argument: str | None, variable: str, sent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", variable)
    with ScriptedServer(chat) as server:
        ready(server, api_key=argument)(images=shades(1), prompts=[PROMPT])
        assert server.headers[-1]["Authorization"] == sent


def test_an_answer_without_a_score_is_missing_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    replies = iter(["Final Score: 4", "I would rather not say.", None])
    with ScriptedServer(lambda path, body: completion(next(replies)) if body else chat(path, body)) as server:
        reward = ready(server, concurrency=1)
        scores = reward(images=shades(3), prompts=[PROMPT] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.8, torch.nan, torch.nan]), equal_nan=True)
    assert reward.missing == 2
    assert "I would rather not say" in caplog.text


def test_concurrency_reaches_but_never_exceeds_its_limit() -> None:
    full = threading.Barrier(4, timeout=5)  # no answer before four requests are in flight

    def answer(path: str, body: Any) -> Any:
        if body is not None:
            full.wait()
            time.sleep(0.02)  # time for a fifth request to arrive, if there is one
        return chat(path, body)

    with ScriptedServer(answer) as server:
        scores = ready(server, concurrency=4)(images=shades(12), prompts=[PROMPT] * 12)
        assert server.most_in_flight == 4
    torch.testing.assert_close(scores, expected(12))


def test_order_is_kept_if_answers_arrive_out_of_order() -> None:
    other_answered = threading.Event()

    def answer(body: Any) -> Any:
        reply = rate(body)
        if "Final Score: 1.0000" in reply["choices"][0]["message"]["content"]:  # the first image is black
            assert other_answered.wait(5)
            time.sleep(0.05)
        other_answered.set()
        return reply

    torch.testing.assert_close(score_shades(answer, count=4), expected(4))


def test_a_slow_answer_within_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.3)
        return rate(body)

    torch.testing.assert_close(score_shades(answer, timeout=3.0, retries=0), expected(2))


def test_a_slow_answer_beyond_the_timeout() -> None:
    def answer(body: Any) -> Any:
        time.sleep(0.8)
        return rate(body)

    with pytest.raises(
        ConnectionError, match=r"UnifiedReward: http://127.*/chat/completions must.*timed out.*raise `timeout`"
    ):
        score_shades(answer, timeout=0.3, retries=0)


@pytest.mark.parametrize("trouble", [(500, {}), (503, {}), (429, {})], ids=str)
def test_temporary_failures_are_retried(trouble: Any) -> None:
    replies = iter([trouble, trouble])
    torch.testing.assert_close(score_shades(lambda body: next(replies, None) or rate(body)), expected(2))


def test_lost_connections_are_retried() -> None:
    replies = iter([DROP])
    torch.testing.assert_close(score_shades(lambda body: next(replies, None) or rate(body)), expected(2))


def test_permanent_failures_report_the_servers_message() -> None:
    with ScriptedServer(
        lambda path, body: (500, {"error": {"message": "EngineDeadError"}}) if body else chat(path, body)
    ) as server:
        with pytest.raises(ConnectionError, match=r"/chat/completions must answer.*3 attempts.*500.*EngineDeadError"):
            ready(server)(images=shades(1), prompts=[PROMPT])
        assert len(server.requests) == 3


def test_rejected_requests_are_not_retried() -> None:
    with ScriptedServer(
        lambda path, body: (400, {"error": {"message": "no images, please"}}) if body else chat(path, body)
    ) as server:
        with pytest.raises(ConnectionError, match="no images, please"):
            ready(server)(images=shades(1), prompts=[PROMPT])
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>It works!</html>",
        b"",
        {},
        [],
        {"choices": []},
        {"choices": None},
        {"choices": [{"text": "Final Score: 4"}]},
        {"choices": [{"message": {"content": 4}}]},
    ],
    ids=repr,
)
def test_unexpected_answers_are_errors(reply: Any) -> None:
    with pytest.raises(
        ValueError, match="UnifiedReward: http.*/chat/completions must answer (JSON|as OpenAI's interface does). Found"
    ):
        score_shades(lambda body: reply)


def test_an_unreachable_server() -> None:
    with ScriptedServer(chat) as server:
        reward = ready(server, retries=1)
        server.stop()
        with pytest.raises(ConnectionError, match=r"http://127.*must answer.*refused.*Check that the server runs"):
            reward(images=shades(1), prompts=[PROMPT])


def test_a_connection_lost_during_an_answer() -> None:
    with pytest.raises(ConnectionError, match=r"http://127.*must answer.*Check that the server runs"):
        score_shades(lambda body: CUT, retries=0)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ({"data": [{"id": "llama"}, {"id": "qwen"}]}, ValueError, rf"serves\. Found '{MODEL}'; it has llama, qwen\."),
        ({"data": []}, ValueError, "it has none"),
        ({"reward": "PickScore"}, ValueError, "/models must answer as OpenAI's interface does"),
        (b"ok", ValueError, "/models must answer JSON"),
        ((404, b"no such page"), ConnectionError, "no such page"),
        ((401, {"error": {"message": "wrong key"}}), ConnectionError, "wrong key"),
    ],
)
def test_setup_refuses_another_kind_of_server(reply: Any, error: type[Exception], message: str) -> None:
    with ScriptedServer(lambda path, body: reply) as server, pytest.raises(error, match=message):
        ready(server)


def test_setup_refuses_an_unreachable_server() -> None:
    with ScriptedServer(chat) as server:
        server.stop()
        with pytest.raises(ConnectionError, match=r"/v1/models must answer.*refused"):
            ready(server, retries=0)


def test_an_invalid_key_is_not_shown() -> None:
    with pytest.raises(ValueError, match="UnifiedReward: a token or key must be ASCII letters") as error:
        UnifiedReward(api_key="sk-secret\n").setup()
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"base_url": "localhost/v1"},
            "`base_url` must begin with .* and name a host. Found 'localhost/v1'",
        ),
        ({"question": "Rate it!"}, r"`question` must hold \{caption\}. Found 'Rate it!'"),
        ({"question": "Is {it} a {caption}?"}, r"`question` must hold no placeholder but \{caption\}. Found \{it\}"),
        ({"size": 0}, "`size` must be >= 1. Found 0"),
        ({"max_tokens": 0}, "`max_tokens` must be >= 1. Found 0"),
        ({"concurrency": 0}, "`concurrency` must be >= 1. Found 0"),
        ({"deadline": 0}, "`deadline` must be > 0 seconds. Found 0"),
        ({"timeout": 0}, "`timeout` must be > 0 seconds. Found 0"),
        ({"retries": -1}, "`retries` must be >= 0. Found -1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"UnifiedReward: {message}"):
        UnifiedReward(**arguments)
