"""UnifiedReward: a vision-language model rates the image, behind any OpenAI-compatible server."""

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
REMEDY = "See that `base_url` names an OpenAI-compatible server and ends as its interface does, mostly in /v1."
EXPECTED = "as OpenAI's interface does"


def final_score(answer: str) -> float:
    """The rating in `answer` / 5; NaN where there is none from 1 to 5.

    >>> final_score("The cat is blue, not red. Final Score: 2.5")
    0.5
    >>> final_score("A fine image."), final_score("Final Score: 10")
    (nan, nan)
    """
    found = FINAL_SCORE.search(answer)
    rating = float(found[1]) if found else torch.nan
    return rating / HIGHEST if rating <= HIGHEST else torch.nan


class UnifiedReward(Reward):
    """Alignment and quality as rated by a vision-language model: the number after "Final Score:", / 5, 0.2 to 1.

    An answer without a rating is missing. The model runs in a server of its own, one of many requests at a time:

        vllm serve CodeGoat24/UnifiedReward-7b-v1.5 --port 17140

    Source: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025; asked as in Flow-GRPO.

    Args:
        base_url: of the server's OpenAI-compatible interface, with its /v1.
        model: name under which the server has the model.
        api_key: the server's key. None: the environment variable OPENAI_API_KEY, which is the better place, or no key where
            that is not set. A run's config.yaml holds what is given here; checkpoints and exported files do not.
        question: what is asked about the image, with {caption} where the prompt goes. None: rate alignment and quality.
        size: side in pixels of the square the image is resized to, >= 1.
        max_tokens: longest answer, >= 1. One that is cut before its rating is missing.
        concurrency: requests in flight at once, >= 1, of each process that trains.
        timeout: seconds for one try, from connecting to the answer's last byte, > 0.
        retries: further tries where the server is gone, too slow, overloaded or answers an error, >= 0; waits a second
            before the second and twice as long before each next, or what the server asks for (Retry-After), up to a minute.
        deadline: seconds for a request with all its tries and pauses, > 0.
        batch_size: images handed to `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
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
                f"UnifiedReward: `question` must hold {{caption}}. Found '{quote(question)}'. Say where it goes."
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
        """Connect, and see that the server answers and has the model.

        Raises:
            ConnectionError: if the server is gone or answers an error.
            ValueError: if it does not have the model.
        """
        if self._ready is not None:
            return
        client = replace(self._client, token=self.api_key or os.environ.get("OPENAI_API_KEY") or None)
        (listing,) = client.ask([Request("/models", client.json_of)])
        try:
            served = [str(model["id"]) for model in listing["data"]]
        except (KeyError, TypeError) as error:
            raise client.garbage("/models", EXPECTED, listing) from error
        if self.model not in served:
            raise ValueError(
                f"UnifiedReward: `model` must be one that {client.shown} serves. Found '{self.model}'; it has "
                f"{quote(', '.join(served)) or 'none'}. Name one of those, or start the server with this one."
            )
        self._ready = client

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """Rating / 5; NaN where the answer has none.

        Raises:
            ConnectionError: if the server is gone, or still answers errors after all retries.
            ValueError: if it answers something that is no chat completion.
        """
        client, pixels = self._loaded(self._ready), eight_bit(images)
        read = partial(self._rating, client)
        pairs = zip(pixels, prompts, strict=True)
        ratings = client.ask([Request("/chat/completions", read, partial(self._question, *pair)) for pair in pairs])
        return torch.tensor(ratings, device=images.device)

    def _question(self, pixels: UInt8[Tensor, "3 h w"], prompt: Prompt) -> bytes:
        picture = {"url": f"data:image/png;base64,{encode_png(pixels, self.size)}"}
        content = [
            {"type": "image_url", "image_url": picture},
            {"type": "text", "text": self.question.replace("{caption}", prompt.text)},
        ]
        asked = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return json.dumps(asked | {"max_tokens": self.max_tokens}).encode()

    def _rating(self, client: JsonClient, answer: Answer) -> float:
        completion = client.json_of(answer)
        try:
            text = completion["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise client.garbage(answer.path, EXPECTED, completion) from error
        if text is not None and not isinstance(text, str):
            raise client.garbage(answer.path, EXPECTED, completion)
        rating = final_score(text or "")
        if rating != rating:
            logger.warning("UnifiedReward: no 'Final Score' from 1 to 5 in '%s'; it is missing", quote(text or ""))
        return rating
