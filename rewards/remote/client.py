"""A reward that a server computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.remote.http_client import Answer, JsonClient, Request, check_url, read_token
from rewards.remote.transport import eight_bit, encode_png, quote

LARGEST = torch.finfo(torch.float32).max
REMEDY = "See that `url` names a server that speaks the protocol in `rewards.remote`, for instance `marble-lightning-serve`."


class RemoteReward(Reward):
    """A reward that a server computes; missing where the server says so.

    `rewards.remote` documents what is sent and expected. Images are rounded to 8 bits on the way.

    Args:
        url: of the server, without /score.
        sources: names of the prompt sets it judges. None: all. A score the server does not give counts as missing.
        request_size: images in one request, >= 1.
        concurrency: requests in flight at once, >= 1, of each process that trains.
        timeout: seconds for one try, from connecting to the answer's last byte, > 0.
        retries: further tries where the server is gone, too slow, overloaded or answers an error, >= 0.
        backoff: the second further try waits twice this many seconds, each next twice as long as the last, >= 0. Where the
            server asks for a longer pause (Retry-After) it gets it, up to a minute.
        deadline: seconds for a request with all its tries and pauses, > 0.
        token_variable: name of an environment variable with the token that the server asks for. None: none is sent.
        batch_size: images handed to `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    identity_fields = (*Reward.identity_fields, "url")

    def __init__(
        self,
        url: str,
        sources: list[str] | None = None,
        request_size: int = 8,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        batch_size: int = 128,
        deadline: float = 300.0,
        token_variable: str | None = None,
    ) -> None:
        super().__init__(batch_size, sources)
        self.url = check_url("RemoteReward", "url", url)
        if request_size < 1:
            raise ValueError(f"RemoteReward: `request_size` must be >= 1. Found {request_size}. It counts images.")
        self.request_size = request_size
        self.retries = retries
        self._client = JsonClient("RemoteReward", self.url, REMEDY, concurrency, timeout, deadline, retries, backoff)
        self.token_variable = token_variable
        self._ready: JsonClient | None = None

    def setup(self) -> None:
        """Connect, and see that a reward answers.

        Raises:
            ConnectionError: if the server is gone or answers an error.
            ValueError: if it answers something else than the protocol says.
        """
        if self._ready is not None:
            return
        client = replace(self._client, token=read_token("RemoteReward", self.token_variable))
        (health,) = client.ask([Request("/health", client.json_of)])
        if not isinstance(health, dict) or not isinstance(health.get("reward"), str):
            raise client.garbage("/health", '{"reward": name}', health)
        self._ready = client

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """What the server says; NaN for its null.

        Raises:
            ConnectionError: if the server is gone, or still answers errors after all retries.
            TypeError: if a prompt's metadata is not JSON.
            ValueError: if the server refuses what it is asked, or answers something else than one number or null an image.
        """
        client, pixels = self._loaded(self._ready), eight_bit(images)
        parts = [slice(start, start + self.request_size) for start in range(0, len(prompts), self.request_size)]
        requests = [
            Request("/score", partial(self._scores, client, len(own)), partial(body_of, pixels[part], own))
            for part in parts
            for own in [prompts[part]]
        ]
        found = client.ask(requests)
        return torch.tensor([score for part in found for score in part], dtype=torch.float32, device=images.device)

    def _scores(self, client: JsonClient, count: int, answer: Answer) -> list[float]:
        if 400 <= answer.status < 500:
            raise ValueError(
                f"RemoteReward: {client.shown}/score must accept what it is asked. Found {answer}. "
                "Mend the prompts, or send less at once: lower `request_size`."
            )
        found = client.json_of(answer)
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list) or not all(score is None or is_number(score) for score in scores):
            raise client.garbage("/score", '{"scores": [finite number or null, ...]}', found)
        if len(scores) != count:
            raise client.garbage("/score", f"{count} scores for {count} images", f"{len(scores)} scores")
        return [torch.nan if score is None else score for score in scores]


def body_of(pixels: UInt8[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> bytes:
    """The body of a request.

    Raises:
        TypeError: if a prompt's metadata is not JSON.
    """
    told = [{"text": prompt.text, "source": prompt.source, "metadata": dict(prompt.metadata)} for prompt in prompts]
    try:
        return json.dumps({"images": [encode_png(image) for image in pixels], "prompts": told}, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"RemoteReward: a prompt's `metadata` must be JSON. Found something else: {quote(error)}. "
            "Keep to texts, finite numbers, lists and mappings."
        ) from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 can hold; NaN and true are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
