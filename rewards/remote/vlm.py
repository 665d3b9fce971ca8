"""A reward from the answers of a vision-language model on an OpenAI-compatible server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.remote.answers import AnswerFormat, check_question
from rewards.remote.chat import EXPECTED, ChatReward
from rewards.remote.http_client import JsonClient
from rewards.remote.messages import Answer, Request
from rewards.remote.transport import eight_bit, encode_png, quote

logger = logging.getLogger(__name__)


class VisionLanguageReward(ChatReward):
    r"""The score that a vision-language model states in its answer to a question about the image.

    The pattern finds the numbers in the answer. Their mean is scaled to 0 to 1, or divided by `divide_by`. An answer without
    a number in the range is a missing score. The model runs on a separate server that handles many requests at once:

        vllm serve Qwen/Qwen2.5-VL-7B-Instruct

    Args:
        question: Question about the image, with {prompt} as placeholder of the prompt. It should ask for an answer that
            `pattern` matches. Other names in braces are refused.
        pattern: Regular expression of Python's `re`, such as `Score: (\d+)`. Each group matches a number of the answer, and
            the mean of the groups counts. To use one of several numbers, write a group for that number only. The first
            match counts.
        lowest: Lowest number that an answer may state.
        highest: Highest number that an answer may state. A number outside the range is a missing score.
        model: Name of the model on the server.
        base_url: URL of the server's OpenAI-compatible interface, including /v1; or a list of the URLs of several servers
            with the same model. The least busy one gets the next request, see `RemoteReward`.
        divide_by: Divisor of the number, > 0. None: map `lowest` to 0 and `highest` to 1.
        api_key: The server's key. None: the environment variable OPENAI_API_KEY, or no key if that is not set. Prefer the
            variable: a run's config.yaml contains a key given here, but checkpoints and exported files do not.
        sources: Names of the prompt sets to score. None: all.
        size: Side in pixels of the square to which the image is resized, >= 1. None: no resizing.
        max_tokens: Maximum number of tokens of an answer, >= 1. An answer cut before its score is a missing score.
        concurrency: Maximum number of simultaneous requests of each training process, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        retries: Number of further attempts at each server if it is unreachable, too slow, overloaded or answers an error,
            >= 0. The first retry is immediate, the second waits a second, and each later one waits twice as long as the one
            before. A longer pause requested by the server (Retry-After) is respected, up to a minute.
        batch_size: Images divided among `concurrency` requests at once, >= 1.
        deadline: Seconds for a request with all its attempts and pauses, > 0.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range, `question` has no {prompt} or an unknown placeholder, or `pattern` does
            not compile or has no group.
    """

    identity_fields = (
        *Reward.identity_fields, "model", "question", "pattern", "lowest", "highest", "divide_by", "size", "max_tokens"
    )  # fmt: skip
    placeholder = "prompt"
    """Name in braces that the prompt replaces in `question`."""

    def __init__(
        self,
        question: str,
        pattern: str,
        lowest: float,
        highest: float,
        model: str,
        base_url: str | list[str] = "http://localhost:8000/v1",
        divide_by: float | None = None,
        api_key: str | None = None,
        sources: list[str] | None = None,
        size: int | None = None,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        batch_size: int = 128,
        deadline: float = 300.0,
    ) -> None:
        super().__init__(model, base_url, api_key, sources, size, concurrency, timeout, retries, batch_size, deadline)
        self.question = check_question(self._name, question, self.placeholder)
        self._format = AnswerFormat(self._name, pattern, lowest, highest, divide_by)
        self.pattern, self.lowest, self.highest, self.divide_by = pattern, lowest, highest, divide_by
        if max_tokens < 1:
            raise ValueError(f"{self._name}: `max_tokens` must be >= 1. Found {max_tokens}. 512 is ample for a rating.")
        self.max_tokens = max_tokens

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the scaled scores of the answers; NaN if an answer has none.

        Raises:
            ConnectionError: if all servers are unreachable, or still answer errors after all retries.
            ValueError: if an answer is not a chat completion.
        """
        client, pixels = self._require_loaded(self._ready), eight_bit(images)
        read = partial(self._read, client)
        pairs = zip(pixels, prompts, strict=True)
        scores = client.ask([Request("/chat/completions", read, partial(self._request, *pair)) for pair in pairs])
        return torch.tensor(scores, device=images.device)

    def parse_answer(self, answer: str) -> float:
        """Return the score that `answer` states, scaled; NaN if there is none. Use it to try a pattern."""
        return self._format.score(answer)

    def _request(self, pixels: UInt8[Tensor, "3 h w"], prompt: Prompt) -> bytes:
        question = self.question.replace(f"{{{self.placeholder}}}", prompt.text)
        return self._body(encode_png(pixels, self.size), question, max_tokens=self.max_tokens)

    def _read(self, client: JsonClient, answer: Answer) -> float:
        completion = client.json_of(answer)
        try:
            text = completion["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise client.unexpected_answer(answer, EXPECTED, completion) from error
        if text is not None and not isinstance(text, str):
            raise client.unexpected_answer(answer, EXPECTED, completion)
        score = self.parse_answer(text or "")
        if score != score:
            scale = f"{self.lowest:g} to {self.highest:g}"
            logger.warning("%s: no score from %s in '%s'; the score is missing", self._name, scale, quote(text or ""))
        return score
