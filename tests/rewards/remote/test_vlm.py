"""The general reward from a vision-language model's answers, and its presets UnifiedReward and UnifiedReward 2."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
from typing import Any

import pytest
import torch
from PIL import Image

from rewards import Prompt, UnifiedReward, UnifiedReward2, VisionLanguageReward
from tests.helpers.scripted_server import MODEL, MODEL_2, ScriptedServer, chat, completion

PROMPT = Prompt("a cat", "plain")
IMAGES = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 3, 6, 10)
TWO = r"Style: (-?[\d.]+), mood: (\S+)"
ANSWER = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def build(pattern: str = r"Score: (-?\d+)", lowest: float = 0, highest: float = 10, **options: Any) -> VisionLanguageReward:
    arguments = {"question": "Rate {prompt}.", "model": MODEL} | options
    return VisionLanguageReward(pattern=pattern, lowest=lowest, highest=highest, **arguments)


@pytest.mark.parametrize(
    ("pattern", "answer", "score"),
    [
        (r"Score: (-?\d+)", "Score: 10", 1.0),
        (r"Score: (-?\d+)", "Score: 0", 0.0),
        (r"Score: (-?\d+)", "First Score: 3. Then Score: 9", 0.3),
        (r"Score: (-?\d+)", "Score: 11", None),
        (r"Score: (-?\d+)", "Score: -1", None),
        (r"Score: (-?\d+)", "", None),
        (r"Score: (\S+)", "Score: nan", None),
        (r"Score: (\S+)", "Score: inf", None),
        (r"Score: (\S+)", "Score: seven", None),
        (TWO, "Style: 4, mood: 7", 0.55),
        (TWO, "Style: 4, mood: good", None),
        (TWO, "Style: 4, mood: 70", None),  # the mean of the others does not replace it
        (TWO, "Style: -4, mood: 9", None),  # although the mean is in the range
        (r"Style: \d+, mood: (\d+)", "Style: 4, mood: 7", 0.7),  # one of several numbers
        (r"(?i)score: (\d)|rating: (\d)", "SCORE: 4", None),  # the second group has no number
    ],
)
def test_scores_in_answers(pattern: str, answer: str, score: float | None) -> None:
    assert build(pattern).parse_answer(answer) == pytest.approx(torch.nan if score is None else score, nan_ok=True)


@pytest.mark.parametrize(
    ("lowest", "highest", "divide_by", "score"), [(0, 10, None, 0.4), (2, 6, None, 0.5), (-4, 4, None, 1), (1, 5, 5, 0.8)]
)
def test_scores_are_scaled(lowest: float, highest: float, divide_by: float | None, score: float) -> None:
    assert build(lowest=lowest, highest=highest, divide_by=divide_by).parse_answer("Score: 4") == pytest.approx(score)


def test_missing_scores_are_nan_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    replies = iter(["Score: 5", "Score: 50", None])
    with ScriptedServer(lambda path, body: completion(next(replies)) if body else chat(path, body)) as server:
        reward = build(base_url=server.url + "/v1", concurrency=1)
        reward.setup()
        scores = reward(images=IMAGES, prompts=[PROMPT] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.5, torch.nan, torch.nan]), equal_nan=True)
    assert reward.missing == 2
    assert "VisionLanguageReward: no score from 0 to 10 in 'Score: 50'" in caplog.text


def test_the_request_holds_the_question_and_the_image() -> None:
    question = 'Is it {prompt}? Answer in JSON: {"score": 3}'
    with ScriptedServer(lambda path, body: completion('{"score": 8}') if body else chat(path, body)) as server:
        reward = build(r'"score": (\d+)', question=question, base_url=server.url + "/v1")
        reward.setup()
        scores = reward(images=IMAGES[:1], prompts=[Prompt("a {prompt} and \\1", "plain")])
        (body,) = server.requests
    image, text = body["messages"][0]["content"]
    assert text["text"] == 'Is it a {prompt} and \\1? Answer in JSON: {"score": 3}'
    png = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert png.size == (10, 6)  # not resized
    assert scores.tolist() == pytest.approx([0.8])


def test_only_chosen_sources_are_scored() -> None:
    with ScriptedServer(lambda path, body: completion("Score: 5") if body else chat(path, body)) as server:
        reward = build(base_url=server.url + "/v1", sources=["plain"])
        reward.setup()
        scores = reward(images=IMAGES[:2], prompts=[PROMPT, Prompt("a dog", "other")])
        assert len(server.requests) == 1
    assert scores.isnan().tolist() == [False, True]


def test_results_of_different_settings_are_kept_apart() -> None:
    identity = build().identity
    changes: list[dict[str, Any]] = [
        {"pattern": r"(\d)"}, {"lowest": 1}, {"highest": 9}, {"divide_by": 2}, {"question": "{prompt}"},
        {"model": "other"}, {"size": 8}, {"max_tokens": 9}, {"sources": ["plain"]},
    ]  # fmt: skip
    assert all(build(**change).identity != identity for change in changes)
    assert build(concurrency=1, base_url="http://other:1/v1").identity == identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "Rate it!"}, r"`question` must hold \{prompt\}. Found 'Rate it!'. Add"),
        ({"question": "{prompt} {b} {a}"}, r"`question` must hold no placeholder but \{prompt\}. Found \{a\}, \{b\}. Rem"),
        ({"pattern": "Score: ("}, r"`pattern` must be a regular expression. Found 'Score: \(': .*position 7. Correct"),
        ({"pattern": r"\d+"}, r"`pattern` must have a group .*Found none in '\\d\+'. Put"),
        ({"pattern": r"(?:\d+)"}, "`pattern` must have a group"),
        ({"lowest": 5, "highest": 5}, "`lowest` must be < `highest`, both finite. Found 5 and 5. Use"),
        ({"highest": torch.inf}, "`lowest` must be < `highest`, both finite. Found 0 and inf"),
        ({"lowest": torch.nan}, "`lowest` must be < `highest`, both finite. Found nan and 10"),
        ({"divide_by": 0}, "`divide_by` must be > 0. Found 0. Use null"),
        ({"divide_by": torch.nan}, "`divide_by` must be > 0. Found nan"),
        ({"size": 0}, "`size` must be >= 1. Found 0"),
        ({"base_url": "localhost"}, "`base_url` must begin with"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^VisionLanguageReward: {message}"):
        build(**arguments)


@pytest.mark.parametrize(
    ("axes", "score"),
    [(None, 0.6), (["alignment"], 0.4), (["style", "alignment"], 0.7), (["coherence"], 0.4)],
)
def test_unified_reward_2_averages_the_chosen_axes(axes: list[str] | None, score: float) -> None:
    answer = "Word-wise Scores: [[cat, 0.1]]\n\n" + ANSWER.format("2.0", 2, "5.000000")
    assert UnifiedReward2(axes=axes).parse_answer(answer) == pytest.approx(score)


@pytest.mark.parametrize("numbers", [(2, 2, 6), (0, 2, 2), (2, "", 2), ("X", "Y", "Z"), (-2, 2, 2)])
def test_unified_reward_2_needs_every_chosen_axis(numbers: tuple[Any, ...]) -> None:
    assert torch.tensor(UnifiedReward2().parse_answer(ANSWER.format(*numbers))).isnan()


def test_unified_reward_2_asks_the_published_question() -> None:
    with ScriptedServer(chat) as server:
        reward = UnifiedReward2(server.url + "/v1")
        reward.setup()
        reward(images=IMAGES[:1], prompts=[PROMPT])
        (body,) = server.requests
    text = body["messages"][0]["content"][1]["text"]
    assert body["model"] == MODEL_2
    assert text.startswith(
        "You are presented with a generated image and its associated text caption. Your task is to analyze"
    )
    assert text.endswith("Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
                         "Your task is provided as follows:\nText Caption: [a cat]")  # fmt: skip


@pytest.mark.parametrize("axes", [[], ["beauty"], ["style", "beauty"], "style"])
def test_unknown_axes_are_refused(axes: Any) -> None:
    with pytest.raises(
        ValueError, match="^UnifiedReward2: `axes` must name one or more of alignment, coherence, style. Found"
    ):
        UnifiedReward2(axes=axes)


def test_earlier_results_keep_their_identity() -> None:
    assert list(inspect.signature(UnifiedReward).parameters) == [
        *("base_url", "model", "api_key", "question", "size", "max_tokens"),
        *("concurrency", "timeout", "retries", "batch_size", "deadline"),
    ]
    identity = UnifiedReward().identity
    assert hashlib.sha256(identity.pop("question").encode()).hexdigest()[:8] == "8836fdd3"
    assert identity == {
        "class": "rewards.UnifiedReward",
        "sources": "None",
        "model": MODEL,
        "size": "512",
        "max_tokens": "512",
    }
