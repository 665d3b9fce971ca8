"""GenEval 2 against a server with known probabilities, and the published score computed from all of them."""

from __future__ import annotations

import base64
import io
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from scipy.stats import gmean

from rewards import GenEval2, Prompt
from tests.helpers.scripted_server import MODEL, ScriptedServer, chat, completion

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PROMPTS = [
    Prompt("two red cows", "geneval2", {"atom_count": 3, "vqa_list": [
        ["How many cows are in the image?", "two"],
        ["Are the cows red?", "Yes"], ["Are there any cows in the image?", "Yes"],
    ]}),
    Prompt("seven dogs", "geneval2", {"atom_count": 2, "vqa_list": [
        ["How many dogs are in the image?", "seven"], ["Are there any dogs in the image?", "Yes"],
    ]}),
    Prompt("a cat", "plain"),
]  # fmt: skip
IMAGES = torch.linspace(0.1, 0.9, 3).view(3, 1, 1, 1).expand(3, 3, 6, 10)
WORDS = [form for word in ("yes", "no", *NUMBERS) for form in (word, word.title(), f" {word}", f" {word.title()}")]
VOCABULARY = [*WORDS, *map(str, range(10)), "The", "There", "I"]


def distribution(body: Any) -> dict[str, float]:
    """The probabilities of all tokens, which depend on the image and on the question."""
    image, text = body["messages"][0]["content"]
    seed = zlib.crc32((image["image_url"]["url"] + text["text"]).encode())
    logits = [random.Random(seed + index).gauss(0, 3) for index in range(len(VOCABULARY))]
    return dict(zip(VOCABULARY, softmax(logits).tolist(), strict=True))


def answer(path: str, body: Any) -> Any:
    """List the likeliest tokens, as many as asked for."""
    if body is None:
        return chat(path, body)
    likeliest = sorted(distribution(body).items(), key=lambda item: -item[1])[: body["top_logprobs"]]
    return completion(likeliest[0][0], dict(likeliest))


def build(server: ScriptedServer, **options: Any) -> GenEval2:
    reward = GenEval2(server.url + "/v1", MODEL, **options)
    reward.setup()
    return reward


def published(bodies: list[Any], prompt: Prompt) -> list[float]:
    """Soft-TIFA's score of each question, from the whole distribution of its first token.

    Each spelling is one token of Qwen's vocabulary, but for a digit after a space: it begins with the space's own token,
    which is not among the tokens here.
    """
    by_question = {body["messages"][0]["content"][1]["text"]: distribution(body) for body in bodies}
    scores = []
    for question, correct in prompt.metadata["vqa_list"]:
        probabilities = by_question[f"{question} Answer in one word."]
        accepted = ["Yes", "yes", " yes", " Yes"]
        if correct != "Yes":
            accepted = [correct, correct.title(), f" {correct}", f" {correct.title()}", str(NUMBERS.index(correct))]
        scores.append(sum(probabilities[token] for token in accepted))
    return scores


def test_scores_are_the_published_ones() -> None:
    with ScriptedServer(answer) as server:
        geometric, arithmetic = (build(server, mean=mean, top_logprobs=99) for mean in ("geometric", "arithmetic"))
        found = geometric(images=IMAGES, prompts=PROMPTS)
        bodies = list(server.requests)
        averages = arithmetic(images=IMAGES, prompts=PROMPTS)
    expected = [published(bodies, prompt) for prompt in PROMPTS[:2]]
    torch.testing.assert_close(found, torch.tensor([*map(gmean, expected), torch.nan]).float(), equal_nan=True)
    torch.testing.assert_close(averages, torch.tensor([*map(np.mean, expected), torch.nan]).float(), equal_nan=True)
    assert len(set(found[:2].tolist())) == 2


def test_few_listed_tokens_change_a_probability_by_little() -> None:
    with ScriptedServer(answer) as server:
        rows = build(server, top_logprobs=20).probabilities(images=IMAGES[:2], prompts=PROMPTS[:2])
        bodies = server.requests
    last = max(sorted(distribution(body).values())[-20] for body in bodies)
    for row, prompt in zip(rows, PROMPTS, strict=False):
        assert row == pytest.approx(published(bodies, prompt), rel=0, abs=6 * last)
        assert min(row) > 0


def test_a_request_has_the_image_before_the_published_question() -> None:
    with ScriptedServer(answer) as server:
        build(server, size=8)(images=IMAGES[:1], prompts=PROMPTS[:1])
        bodies = {body["messages"][0]["content"][1]["text"]: body for body in server.requests}
    assert set(bodies) == {f"{question} Answer in one word." for question, _ in PROMPTS[0].metadata["vqa_list"]}
    for body in bodies.values():
        assert {key: body[key] for key in ("max_tokens", "logprobs", "top_logprobs", "temperature")} == {
            "max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 0,
        }  # fmt: skip
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (8, 8)


def test_an_answer_of_another_kind_is_a_missing_score(caplog: pytest.LogCaptureFixture) -> None:
    thinks = completion("<think>", {"<think>": 0.9, "Okay": 0.1})
    with ScriptedServer(lambda path, body: thinks if body else chat(path, body)) as server:
        reward = build(server)
        assert reward(images=IMAGES[:1], prompts=PROMPTS[:1]).isnan().all()
    assert reward.missing == 1
    assert "GenEval2: no answer to 'Are the cows red?' among '<think>, Okay'; the score is missing" in caplog.text


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": []}, {"content": [{"top_logprobs": []}]},
                 {"content": [{"top_logprobs": [{"token": "Yes"}]}]}],
)  # fmt: skip
def test_answers_without_log_probabilities_are_errors(logprobs: Any) -> None:
    reply = completion("Yes")
    reply["choices"][0]["logprobs"] = logprobs
    with (
        ScriptedServer(lambda path, body: reply if body else chat(path, body)) as server,
        pytest.raises(ValueError, match=r"^GenEval2: http.*/chat/completions must answer with the log-probabilities"),
    ):
        build(server)(images=IMAGES[:1], prompts=PROMPTS[:1])


def test_results_are_divided_by_the_number_of_atoms() -> None:
    reward = GenEval2()
    assert [reward.tag(prompt) for prompt in PROMPTS] == ["03 atoms", "02 atoms", None]
    with pytest.raises(ValueError, match="GenEval2: `atom_count` must be an integer. Found 'three'"):
        reward.check_prompt(Prompt("", "x", PROMPTS[0].metadata | {"atom_count": "three"}))
    with pytest.raises(ValueError, match="GenEval2: an entry of `vqa_list` must be"):
        reward.check_prompt(Prompt("", "x", {"vqa_list": [["Are the cows red?", "No"]]}))


def test_results_of_different_settings_are_kept_apart() -> None:
    identity = GenEval2().identity
    changes: list[dict[str, Any]] = [{"mean": "arithmetic"}, {"model": "other"}, {"size": 8}, {"top_logprobs": 5}]
    assert all(GenEval2(**change).identity != identity for change in changes)
    assert GenEval2("http://other:1/v1", concurrency=1).identity == identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": "harmonic"}, "`mean` must be one of geometric, arithmetic. Found 'harmonic'"),
        ({"top_logprobs": 0}, "`top_logprobs` must be >= 1. Found 0"),
        ({"size": 0}, "`size` must be >= 1. Found 0"),
        ({"base_url": "localhost"}, "`base_url` must begin with"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GenEval2: {message}"):
        GenEval2(**arguments)
