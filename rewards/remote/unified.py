"""UnifiedReward: a vision-language model on an OpenAI-compatible server rates the image."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.remote.http_client import Answer, JsonClient, Request, check_url
from rewards.remote.transport import eight_bit, encode_png, quote

logger = logging.getLogger(__name__)

QUESTION = """This image was generated from a text caption. Rate it by two criteria:
1. Alignment with the caption: does it show the objects, attributes, counts and relations that the caption describes?
2. Overall quality: is it clear, rich in detail, right in its colours and pleasing to look at?
Weigh both and give one score from 1 (worst) to 5 (best). End your answer with "Final Score: X", where X is that score.
Text caption: {caption}"""

FINAL_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)")
HIGHEST = 5
REMEDY = "Set `base_url` to an OpenAI-compatible server, with the path of its interface, usually /v1."
EXPECTED = "as OpenAI's interface does"


def final_score(answer: str) -> float:
    """Return the rating in `answer` / 5; NaN if there is no rating from 1 to 5.

    >>> final_score("The cat is blue, not red. Final Score: 2.5")
    0.5
    >>> final_score("A fine image."), final_score("Final Score: 10")
    (nan, nan)
    """
    match = FINAL_SCORE.search(answer)
    rating = float(match[1]) if match else torch.nan
    return rating / HIGHEST if rating <= HIGHEST else torch.nan


class UnifiedReward(Reward):
    """Alignment and quality rated by a vision-language model: the number after "Final Score:" / 5, 0.2 to 1.

    An answer without a rating is a missing score. The model runs on a separate server that handles many requests at once:

        vllm serve CodeGoat24/UnifiedReward-7b-v1.5 --port 17140

    Args:
        base_url: URL of the server's OpenAI-compatible interface, including /v1.
        model: Name of the model on the server.
        api_key: The server's key. None: the environment variable OPENAI_API_KEY, or no key if that is not set. Prefer the
            variable: a run's config.yaml contains a key given here, but checkpoints and exported files do not.
        question: Question about the image, with {caption} as placeholder of the prompt. None: rate alignment and quality.
        size: Side in pixels of the square to which the image is resized, >= 1.
        max_tokens: Maximum number of tokens of an answer, >= 1. An answer cut before its rating is a missing score.
        concurrency: Maximum number of simultaneous requests of each training process, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        retries: Number of further attempts if the server is unreachable, too slow, overloaded or answers an error, >= 0. The
            first retry is immediate, the second waits a second, and each later one waits twice as long as the one before. A
            longer pause requested by the server (Retry-After) is respected, up to a minute.
        deadline: Seconds for a request with all its attempts and pauses, > 0.
        batch_size: Images divided among `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025; used as in Flow-GRPO.
    """

    identity_fields = (*Reward.identity_fields, "model", "question", "size", "max_tokens")

    def __init__(
        self,
        base_url: str = "http://localhost:17140/v1",
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        api_key: str | None = None,
        question: str | None = None,
        size: int = 512,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        batch_size: int = 128,
        deadline: float = 300.0,
    ) -> None:
        super().__init__(batch_size)
        self.base_url = check_url("UnifiedReward", "base_url", base_url)
        if question is not None and "{caption}" not in question:
            raise ValueError(
                f"UnifiedReward: `question` must hold {{caption}}. Found '{quote(question)}'. Add the placeholder."
            )
        if size < 1:
            raise ValueError(f"UnifiedReward: `size` must be >= 1. Found {size}. The published runs use 512.")
        if max_tokens < 1:
            raise ValueError(f"UnifiedReward: `max_tokens` must be >= 1. Found {max_tokens}. 512 is ample for a rating.")
        self.model = model
        self.api_key = api_key
        self.question = QUESTION if question is None else question
        self.size = size
        self.max_tokens = max_tokens
        self.retries = retries
        self._client = JsonClient("UnifiedReward", self.base_url, REMEDY, concurrency, timeout, deadline, retries)
        self._ready: JsonClient | None = None

    def setup(self) -> None:
        """Connect, and check that the server answers and has the model.

        Raises:
            ConnectionError: if the server is unreachable or answers an error.
            ValueError: if the server does not have the model.
        """
        if self._ready is not None:
            return
        client = replace(self._client, token=self.api_key or os.environ.get("OPENAI_API_KEY") or None)
        (listing,) = client.ask([Request("/models", client.json_of)])
        try:
            served = [str(model["id"]) for model in listing["data"]]
        except (KeyError, TypeError) as error:
            raise client.unexpected_answer("/models", EXPECTED, listing) from error
        if self.model not in served:
            raise ValueError(
                f"UnifiedReward: `model` must be one that {client.public_url} serves. Found '{self.model}'; it has "
                f"{quote(', '.join(served)) or 'none'}. Name one of those, or start the server with this one."
            )
        self._ready = client

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return rating / 5; NaN if the answer has no rating.

        Raises:
            ConnectionError: if the server is unreachable, or still answers errors after all retries.
            ValueError: if an answer is not a chat completion.
        """
        client, pixels = self._require_loaded(self._ready), eight_bit(images)
        read = partial(self._rating, client)
        pairs = zip(pixels, prompts, strict=True)
        ratings = client.ask([Request("/chat/completions", read, partial(self._question, *pair)) for pair in pairs])
        return torch.tensor(ratings, device=images.device)

    def _question(self, pixels: UInt8[Tensor, "3 h w"], prompt: Prompt) -> bytes:
        image_url = {"url": f"data:image/png;base64,{encode_png(pixels, self.size)}"}
        content = [
            {"type": "image_url", "image_url": image_url},
            {"type": "text", "text": self.question.replace("{caption}", prompt.text)},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return json.dumps(body | {"max_tokens": self.max_tokens}).encode()

    def _rating(self, client: JsonClient, answer: Answer) -> float:
        completion = client.json_of(answer)
        try:
            text = completion["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise client.unexpected_answer(answer.path, EXPECTED, completion) from error
        if text is not None and not isinstance(text, str):
            raise client.unexpected_answer(answer.path, EXPECTED, completion)
        rating = final_score(text or "")
        if rating != rating:
            logger.warning("UnifiedReward: no 'Final Score' from 1 to 5 in '%s'; the score is missing", quote(text or ""))
        return rating
