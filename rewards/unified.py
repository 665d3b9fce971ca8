"""UnifiedReward: a vision-language model rates the image, behind any OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.transport import check_connection, eight_bit, encode_png, map_in_threads, quote

if TYPE_CHECKING:
    from openai import OpenAI

logger = logging.getLogger(__name__)

QUESTION = """This image was generated from a text caption. Rate it by two criteria:
1. Alignment with the caption: does it show the objects, attributes, counts and relations that the caption describes?
2. Overall quality: is it clear, rich in detail, right in its colours and pleasing to look at?
Weigh both and give one score from 1 (worst) to 5 (best). End your answer with "Final Score: X", where X is that score.
Text caption: {caption}"""

FINAL_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)")
HIGHEST = 5


def final_score(answer: str) -> float:
    """The rating in `answer` / 5; NaN where there is none from 1 to 5.

    >>> final_score("The cat is blue, not red. Final Score: 2.5")
    0.5
    >>> final_score("A fine picture."), final_score("Final Score: 10")
    (nan, nan)
    """
    found = FINAL_SCORE.search(answer)
    rating = float(found[1]) if found else torch.nan
    return rating / HIGHEST if rating <= HIGHEST else torch.nan


class UnifiedReward(Reward):
    """Alignment and quality as rated by a vision-language model: the number after "Final Score:", / 5, 0.2 to 1.

    An answer without a rating is missing. The model runs in a server of its own, one of many requests at a time:

        vllm serve CodeGoat24/UnifiedReward-7b-v1.5 --port 17140

    Needs the extra `unified`.

    Source: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025; asked as in Flow-GRPO.

    Args:
        base_url: of the server's OpenAI-compatible interface, with its /v1.
        model: name under which the server has the model.
        api_key: the server's key. None: the environment variable OPENAI_API_KEY, or "none" where that is not set. A run's
            config.yaml holds what is given here; its checkpoints, and what is exported from them, do not.
        question: what is asked about the image, with {caption} where the prompt goes. None: rate alignment and quality.
        size: side in pixels of the square the image is resized to, >= 1.
        max_tokens: longest answer, >= 1. One that is cut before its rating is missing.
        concurrency: requests in flight at once, >= 1, of each process that trains.
        timeout: seconds to wait for an answer, > 0.
        retries: further tries where the server is gone, too slow, overloaded or answers an error, >= 0; waits half a
            second before the first and twice as long before each next, up to 8 seconds.
        batch_size: images handed to `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    scored_by = (*Reward.scored_by, "model", "question", "size", "max_tokens")

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
    ) -> None:
        super().__init__(batch_size)
        self.base_url = check_connection(
            "UnifiedReward", url=base_url, url_name="base_url", concurrency=concurrency, timeout=timeout, retries=retries
        )
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
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self._client: OpenAI | None = None

    def setup(self) -> None:
        """Connect, and see that the server answers and has the model.

        Raises:
            ImportError: if the package `openai` is not there.
            ConnectionError: if the server is gone or answers an error.
            ValueError: if it does not have the model.
        """
        if self._client is not None:
            return
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError(
                "UnifiedReward: the package `openai` must be installed. Found none. "
                "Install the extra: pip install 'marble-lightning[unified]'."
            ) from error
        client = OpenAI(
            base_url=self.base_url,
            api_key=self.api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.retries,
        )
        listing = self._call("/models", client.models.list)
        try:
            served = [model.id for model in listing.data]
        except (AttributeError, TypeError) as error:
            raise self._garbage("/models", listing) from error
        if self.model not in served:
            raise ValueError(
                f"UnifiedReward: `model` must be one that {self.base_url} serves. Found '{self.model}'; it has "
                f"{', '.join(served) or 'none'}. Name one of those, or start the server with this one."
            )
        self._client = client

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """Rating / 5; NaN where the answer has none.

        Raises:
            ConnectionError: if the server is gone, or still answers errors after all retries.
            ValueError: if it answers something that is no chat completion.
        """
        client = self._loaded(self._client)

        def rate(pair: tuple[UInt8[Tensor, "3 h w"], Prompt]) -> float:
            answer = self._ask(client, *pair)
            rating = final_score(answer)
            if rating != rating:
                logger.warning("UnifiedReward: no 'Final Score' from 1 to 5 in '%s'; it is missing", quote(answer))
            return rating

        pairs = list(zip(eight_bit(images), prompts, strict=True))
        return torch.tensor(map_in_threads(rate, pairs, self.concurrency), device=images.device)

    def _ask(self, client: OpenAI, pixels: UInt8[Tensor, "3 h w"], prompt: Prompt) -> str:
        picture = {"url": f"data:image/png;base64,{encode_png(pixels, self.size)}"}
        content: list[Any] = [
            {"type": "image_url", "image_url": picture},
            {"type": "text", "text": self.question.replace("{caption}", prompt.text)},
        ]
        completion = self._call(
            "/chat/completions",
            client.chat.completions.create,
            model=self.model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=self.max_tokens,
        )
        try:
            answer = completion.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:  # the package checks no answer's form
            raise self._garbage("/chat/completions", completion) from error
        if answer is not None and not isinstance(answer, str):
            raise self._garbage("/chat/completions", completion)
        return answer or ""

    def _call(self, path: str, method: Any, **arguments: Any) -> Any:
        from openai import APIStatusError, OpenAIError

        try:
            return method(**arguments)
        except OpenAIError as error:
            if isinstance(error, APIStatusError):
                said = f"{error.status_code} {error.response.reason_phrase}: {quote(error.response.text)}"
            else:
                said = quote(f"{error} {error.__cause__ or ''}")
            raise ConnectionError(
                f"UnifiedReward: {self.base_url}{path} must answer. Found after {1 + self.retries} tries at most: {said}. "
                "See that the server runs and what its log says; raise `timeout` if it is slow, `retries` if it restarts."
            ) from error
        except ValueError as error:  # JSON in name only
            raise self._garbage(path, error) from error

    def _garbage(self, path: str, found: Any) -> ValueError:
        return ValueError(
            f"UnifiedReward: {self.base_url}{path} must answer as OpenAI's interface does. Found '{quote(found)}'. "
            "See that `base_url` names an OpenAI-compatible server and ends as its interface does, mostly in /v1."
        )
