"""GenEval 2 as a reward: the probability of correct answers to questions about the image."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.remote.chat import ChatReward
from rewards.remote.http_client import JsonClient
from rewards.remote.messages import Answer, Request
from rewards.remote.soft_tifa import answer_probability, read_questions
from rewards.remote.transport import eight_bit, encode_png, quote
from rewards.texts import excerpt

logger = logging.getLogger(__name__)

MEANS = ("geometric", "arithmetic")
INSTRUCTION = "Answer in one word."
EXPECTED = "with the log-probabilities of the first token, as OpenAI's interface does with `top_logprobs`"
MAX_LOGPROBS = 20
"""Tokens that OpenAI's interface, and a vLLM server without `--max-logprobs`, list at most."""


class GenEval2(ChatReward):
    r"""Soft-TIFA: the mean probability of the correct answers to the questions about a prompt, 0 to 1.

    A vision-language model is asked each question of `vqa_list` in the prompt's metadata. The probability of the correct
    answer is the sum over the first tokens that spell it. The score is the geometric mean $(\prod_i p_i)^{1/n}$, the
    published score of a prompt, or the arithmetic mean $\frac{1}{n} \sum_i p_i$. The model runs on a separate server:

        vllm serve Qwen/Qwen3-VL-8B-Instruct

    It applies only to prompts with questions. An image with an answer that is no number, yes or no is a missing score.

    Args:
        base_url: URL of the server's OpenAI-compatible interface, including /v1; or a list of several.
        model: Name of the model on the server.
        mean: "geometric", as published for prompts, or "arithmetic", as published for single questions. One wrong answer
            makes the geometric mean small; the arithmetic mean gives credit for each correct answer.
        top_logprobs: Number of the likeliest tokens that the server lists, 1 to what it allows, usually 20. A correct answer
            that is not listed has the probability of the last one listed.
        **kwargs: Options of the requests, see `VisionLanguageReward`.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if `mean` is not one of the two, or an argument is out of range.

    Source: Kamath et al., "GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation", 2025. The benchmark's score
    is the mean over its 800 prompts.
    """

    identity_fields = (*Reward.identity_fields, "model", "size", "mean", "top_logprobs")

    def __init__(
        self,
        base_url: str | list[str] = "http://localhost:8000/v1",
        model: str = "Qwen/Qwen3-VL-8B-Instruct",
        mean: Literal["geometric", "arithmetic"] = "geometric",
        top_logprobs: int = MAX_LOGPROBS,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, base_url=base_url, **kwargs)
        if mean not in MEANS:
            raise ValueError(f"GenEval2: `mean` must be one of {', '.join(MEANS)}. Found {mean!r}. Choose one of them.")
        if top_logprobs < 1:
            raise ValueError(f"GenEval2: `top_logprobs` must be >= 1. Found {top_logprobs}. Servers usually allow 20.")
        self.mean, self.top_logprobs = mean, top_logprobs

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has questions."""
        return bool(prompt.metadata.get("vqa_list"))

    def tag(self, prompt: Prompt) -> str | None:
        """Return the prompt's `atom_count`, the number of its requirements, by which the benchmark divides its score."""
        count = prompt.metadata.get("atom_count")
        return f"{count:02d} atoms" if isinstance(count, int) else None

    def check_prompt(self, prompt: Prompt) -> None:
        """Reject questions that are not in the benchmark's format."""
        read_questions(prompt.metadata)
        if not isinstance(count := prompt.metadata.get("atom_count", 0), int):
            raise ValueError(f"GenEval2: `atom_count` must be an integer. Found {excerpt(count)}. Correct the prompt file.")

    def probabilities(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return the probabilities of the correct answers of each image, in the order of its prompt's questions.

        Args:
            images: Pixels in [0, 1], float32.
            prompts: One prompt per image; `supports` is true for each.

        Raises:
            ConnectionError: if all servers are unreachable, or still answer errors after all retries.
            ValueError: if an answer has no log-probabilities, or a prompt's questions are malformed.
        """
        client, pixels = self._require_loaded(self._ready), eight_bit(images)
        questions = [read_questions(prompt.metadata) for prompt in prompts]
        requests: list[Request] = []
        for image, pairs in zip(pixels, questions, strict=True):
            png = encode_png(image, self.size)
            for question, answer in pairs:
                options = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
                body = partial(self._body, png, f"{question} {INSTRUCTION}", **options)
                requests.append(Request("/chat/completions", partial(self._read, client, question, answer), body))
        found = iter(client.ask(requests))
        return [list(islice(found, len(pairs))) for pairs in questions]

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the mean of the probabilities of each image; NaN if one is missing."""
        found = self.probabilities(images=images, prompts=prompts)
        scores = [fmean(row) if self.mean == "arithmetic" else math.prod(row) ** (1 / len(row)) for row in found]
        return torch.tensor(scores, device=images.device)

    def _read(self, client: JsonClient, question: str, answer: str, reply: Answer) -> float:
        completion = client.json_of(reply)
        try:
            listed = completion["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            tokens = [(str(entry["token"]), float(entry["logprob"])) for entry in listed]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise client.unexpected_answer(reply, EXPECTED, completion) from error
        if not tokens:
            raise client.unexpected_answer(reply, EXPECTED, completion)
        probability = answer_probability(answer, tokens)
        if math.isnan(probability):
            names = quote(", ".join(token for token, _ in tokens))
            logger.warning("GenEval2: no answer to '%s' among '%s'; the score is missing", quote(question), names)
        return probability
