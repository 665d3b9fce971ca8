"""The base of rewards that ask a vision-language model on an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from typing import Any

from rewards.base import Reward
from rewards.remote.addresses import check_urls
from rewards.remote.http_client import JsonClient
from rewards.remote.messages import Answer, Request
from rewards.remote.transport import quote

REMEDY = "Set `base_url` to an OpenAI-compatible server, with the path of its interface, usually /v1."
EXPECTED = "as OpenAI's interface does"


class ChatReward(Reward):
    """A reward that asks a vision-language model about an image; a subclass says what it asks and how it reads the answers.

    Args:
        model: Name of the model on the server.
        base_url: URL of the server's OpenAI-compatible interface, including /v1; or a list of the URLs of several servers
            with the same model. The least busy one gets the next request, see `RemoteReward`.
        api_key: The server's key. None: the environment variable OPENAI_API_KEY, or no key if that is not set. Prefer the
            variable: a run's config.yaml contains a key given here, but checkpoints and exported files do not.
        sources: Names of the prompt sets to score. None: all.
        size: Side in pixels of the square to which the image is resized, >= 1. None: no resizing.
        concurrency: Maximum number of simultaneous requests of each training process, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        retries: Number of further attempts at each server if it is unreachable, too slow, overloaded or answers an error,
            >= 0.
        batch_size: Images divided among `concurrency` requests at once, >= 1.
        deadline: Seconds for a request with all its attempts and pauses, > 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | list[str] = "http://localhost:8000/v1",
        api_key: str | None = None,
        sources: list[str] | None = None,
        size: int | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        batch_size: int = 128,
        deadline: float = 300.0,
    ) -> None:
        super().__init__(batch_size, sources)
        urls = check_urls(self._name, "base_url", base_url)
        self.base_url = urls[0] if isinstance(base_url, str) else urls
        if size is not None and size < 1:
            raise ValueError(f"{self._name}: `size` must be >= 1. Found {size}. The published runs use 512.")
        self.model, self.api_key, self.size, self.retries = model, api_key, size, retries
        self._client = JsonClient(self._name, urls, REMEDY, concurrency, timeout, deadline, retries)
        self._ready: JsonClient | None = None

    def setup(self) -> None:
        """Connect, and check that the server answers and has the model.

        Raises:
            ConnectionError: if all servers are unreachable, or one answers an error.
            ValueError: if a server does not have the model.
        """
        if self._ready is not None:
            return
        client = replace(self._client, token=self.api_key or os.environ.get("OPENAI_API_KEY") or None)
        client.connect(Request("/models", partial(self._check, client)))
        self._ready = client

    def _check(self, client: JsonClient, answer: Answer) -> None:
        listing = client.json_of(answer)
        try:
            served = [str(model["id"]) for model in listing["data"]]
        except (KeyError, TypeError) as error:
            raise client.unexpected_answer(answer, EXPECTED, listing) from error
        if self.model not in served:
            raise ValueError(
                f"{self._name}: `model` must be one that {answer.url.removesuffix('/models')} serves. Found '{self.model}'; "
                f"it has {quote(', '.join(served)) or 'none'}. Name one of those, or start the server with this one."
            )

    def _body(self, png: str, question: str, **options: Any) -> bytes:
        """Encode a request with an image, a PNG in base64, and a question about it."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": question},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return json.dumps(body | options).encode()
