"""A reward that a server computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.remote.addresses import check_urls, read_token
from rewards.remote.http_client import JsonClient
from rewards.remote.messages import Answer, Request
from rewards.remote.transport import eight_bit, encode_png, quote

REFUSED = (400, 413, 415, 422)
"""HTTP statuses of a server that refuses the content of a request; another request may be accepted."""
LARGEST = torch.finfo(torch.float32).max
REMEDY = "Set `url` to a server that speaks the protocol in `rewards.remote`, for instance `marble-lightning-serve`."


class RemoteReward(Reward):
    """A reward that one server computes, or several that serve the same reward; a null score is a missing score.

    `rewards.remote` documents the protocol. Images are rounded to 8 bits. Of several servers the least busy one gets the
    next request. One that fails is left out for 30 seconds, as long as another one answers.

    Args:
        url: URL of the server, without /score; or a list of the URLs of several servers.
        sources: Names of the prompt sets to score. None: all. A null score of the server counts as missing.
        request_size: Images per request, >= 1.
        concurrency: Maximum number of simultaneous requests of each training process, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        retries: Number of further attempts at each server if it is unreachable, too slow, overloaded or answers an error,
            >= 0.
        backoff: The first retry is immediate, the second waits twice this many seconds, and each later one waits twice as
            long as the one before, >= 0. A longer pause requested by the server (Retry-After) is respected, up to a minute.
            Other servers are tried without a pause.
        deadline: Seconds for a request with all its attempts and pauses, > 0.
        token_variable: Name of an environment variable with the token that the server requires. None: no token is sent.
        batch_size: Images divided among `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    identity_fields = (*Reward.identity_fields, "url")

    def __init__(
        self,
        url: str | list[str],
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
        urls = check_urls("RemoteReward", "url", url)
        self.url = urls[0] if isinstance(url, str) else urls
        if request_size < 1:
            raise ValueError(f"RemoteReward: `request_size` must be >= 1. Found {request_size}. It counts images.")
        self.request_size = request_size
        self.retries = retries
        self._client = JsonClient("RemoteReward", urls, REMEDY, concurrency, timeout, deadline, retries, backoff)
        self.token_variable = token_variable
        self._ready: JsonClient | None = None
        self._served: tuple[str, str] | None = None
        """URL of the first server that has answered, and the name of its reward."""
        self._identity: tuple[str, Mapping[str, Any]] | None = None
        """The same with the identity of its reward, of the first server that has one."""

    def setup(self) -> None:
        """Connect, and check that a reward answers, the same one at all servers.

        A server that is unreachable now is checked before its first request, unless all are.

        Raises:
            ConnectionError: if all servers are unreachable, or one answers an error.
            ValueError: if an answer violates the protocol, or the servers serve different rewards or other settings of one.
        """
        if self._ready is not None:
            return
        client = replace(self._client, token=read_token("RemoteReward", self.token_variable))
        client.connect(Request("/health", partial(self._check, client)))
        self._ready = client

    def _check(self, client: JsonClient, answer: Answer) -> None:
        health = client.json_of(answer)
        fits = isinstance(health, dict) and isinstance(health.get("identity"), dict | None)
        if not fits or not isinstance(health.get("reward"), str):
            raise client.unexpected_answer(answer, '{"reward": name}, with an object "identity" or none', health)
        first, name = self._served = self._served or (answer.url, health["reward"])
        if health["reward"] != name:
            raise ValueError(
                f"RemoteReward: all servers in `url` must serve one reward. Found {quote(health['reward'])} at {answer.url} "
                f"and {quote(name)} at {first}. Start them with the same `--reward`."
            )
        identity = health.get("identity")
        if identity is not None:  # other kinds of servers may not have it
            self._check_identity(answer.url, identity)

    def _check_identity(self, url: str, identity: Mapping[str, Any]) -> None:
        first, expected = self._identity = self._identity or (url, identity)
        if names := [name for name in {**expected, **identity} if identity.get(name) != expected.get(name)]:
            found, other = (", ".join(f"{name} {part.get(name)}" for name in names) for part in (identity, expected))
            raise ValueError(
                f"RemoteReward: all servers in `url` must serve one reward with the same settings. Found {quote(found)} at "
                f"{url} and {quote(other)} at {first}. Start them with the same options of `--reward`."
            )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the server's scores; null becomes NaN.

        Raises:
            ConnectionError: if all servers are unreachable, or still answer errors after all retries, or one refuses the
                token or does not know the URL.
            TypeError: if a prompt's metadata is not JSON.
            ValueError: if a server rejects the images or prompts, or does not answer with one number or null per image.
        """
        client, pixels = self._require_loaded(self._ready), eight_bit(images)
        parts = [slice(start, start + self.request_size) for start in range(0, len(prompts), self.request_size)]
        requests = [
            Request(
                "/score", partial(self._scores, client, len(prompts[part])), partial(body_of, pixels[part], prompts[part])
            )
            for part in parts
        ]
        scores = client.ask(requests)
        return torch.tensor([score for part in scores for score in part], dtype=torch.float32, device=images.device)

    def _scores(self, client: JsonClient, count: int, answer: Answer) -> list[float]:
        if answer.status in REFUSED:
            raise ValueError(
                f"RemoteReward: {answer.url} must accept the request. Found {answer}. "
                "Fix the prompts, or send fewer images per request: lower `request_size`."
            )
        content = client.json_of(answer)
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list) or not all(score is None or is_number(score) for score in scores):
            raise client.unexpected_answer(answer, '{"scores": [finite number or null, ...]}', content)
        if len(scores) != count:
            raise client.unexpected_answer(answer, f"{count} scores for {count} images", f"{len(scores)} scores")
        return [torch.nan if score is None else score for score in scores]


def body_of(pixels: UInt8[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> bytes:
    """Encode the body of a request as JSON.

    Raises:
        TypeError: if a prompt's metadata is not JSON.
    """
    items = [{"text": prompt.text, "source": prompt.source, "metadata": dict(prompt.metadata)} for prompt in prompts]
    try:
        return json.dumps({"images": [encode_png(image) for image in pixels], "prompts": items}, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"RemoteReward: a prompt's `metadata` must be JSON. Found something else: {quote(error)}. "
            "Use only texts, finite numbers, lists and mappings."
        ) from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number within the range of float32; NaN and true are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
