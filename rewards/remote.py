"""Any reward behind HTTP: on another machine, in another environment, shared by several runs.

`marble-lightning-serve --reward rewards.PickScore` serves a reward of this package or your own. A server of another kind has
to answer two requests, both with JSON:

    GET {url}/health
        -> {"reward": name}

    POST {url}/score
        {"images": [PNG, ...], "prompts": [{"text": str, "source": str, "metadata": {...}}, ...]}
        -> {"scores": [number or null, ...]}

Images are 8-bit RGB PNGs in base64, all of one size, one for each prompt. Scores come in the order of the images, higher is
better; null is a score that could not be had. An answer of another status than 200 is an error; {"error": text} says which.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.transport import check_connection, eight_bit, encode_png, map_in_threads, quote

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Statuses that may be over soon."""
LARGEST = torch.finfo(torch.float32).max


class RemoteReward(Reward):
    """A reward that a server computes; missing where the server says so.

    `rewards.remote` documents what is sent and expected. Images are rounded to 8 bits on the way.

    Args:
        url: of the server, without /score.
        sources: names of the prompt sets it judges. None: all. A score the server does not give counts as missing.
        request_size: images in one request, >= 1.
        concurrency: requests in flight at once, >= 1, of each process that trains.
        timeout: seconds to wait for an answer, > 0.
        retries: further tries where the server is gone, too slow, overloaded or answers an error, >= 0.
        backoff: the second further try waits twice this many seconds, each next twice as long as the last, >= 0.
        batch_size: images handed to `concurrency` requests at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    scored_by = (*Reward.scored_by, "url")

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
    ) -> None:
        super().__init__(batch_size, sources)
        self.url = check_connection(
            "RemoteReward", url=url, url_name="url", concurrency=concurrency, timeout=timeout, retries=retries
        )
        if request_size < 1:
            raise ValueError(f"RemoteReward: `request_size` must be >= 1. Found {request_size}. It counts images.")
        if not backoff >= 0:
            raise ValueError(f"RemoteReward: `backoff` must be >= 0 seconds. Found {backoff}. 0.5 is gentle to a server.")
        self.request_size = request_size
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self._session: Any = None

    def setup(self) -> None:
        """Connect, and see that a reward answers.

        Raises:
            ConnectionError: if the server is gone or answers an error.
            ValueError: if it answers something else than the protocol says.
        """
        if self._session is not None:
            return
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry

        retry = Retry(
            total=self.retries,
            backoff_factor=self.backoff,
            backoff_jitter=self.backoff,  # requests that failed together come back apart
            status_forcelist=TRY_AGAIN,
            allowed_methods=None,  # all, so POST too: scoring twice does no harm
            raise_on_status=False,  # the last answer says what is wrong
        )
        session = requests.Session()
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # all that threads would share and change
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=self.concurrency, max_retries=retry)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        health = self._ask(session, "GET", "/health")
        if not isinstance(health, dict) or not isinstance(health.get("reward"), str):
            raise self._garbage("/health", '{"reward": name}', health)
        self._session = session

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """What the server says; NaN for its null.

        Raises:
            ConnectionError: if the server is gone, or still answers errors after all retries.
            TypeError: if a prompt's metadata is not JSON.
            ValueError: if the server refuses what it is asked, or answers something else than one number or null an image.
        """
        session = self._loaded(self._session)
        pixels = eight_bit(images)

        def ask(part: slice) -> list[float]:
            return self._scores(session, pixels[part], prompts[part])

        parts = [slice(start, start + self.request_size) for start in range(0, len(prompts), self.request_size)]
        found = map_in_threads(ask, parts, self.concurrency)
        return torch.tensor([score for part in found for score in part], dtype=torch.float32, device=images.device)

    def _scores(self, session: Any, pixels: UInt8[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> list[float]:
        told = [{"text": prompt.text, "source": prompt.source, "metadata": dict(prompt.metadata)} for prompt in prompts]
        try:
            body = json.dumps({"images": [encode_png(image) for image in pixels], "prompts": told}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"RemoteReward: a prompt's `metadata` must be JSON. Found something else: {quote(error)}. "
                "Keep to texts, finite numbers, lists and mappings."
            ) from error
        answer = self._ask(session, "POST", "/score", body.encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or not all(score is None or is_number(score) for score in scores):
            raise self._garbage("/score", '{"scores": [finite number or null, ...]}', answer)
        if len(scores) != len(prompts):
            raise self._garbage("/score", f"{len(prompts)} scores for {len(prompts)} images", f"{len(scores)} scores")
        return [torch.nan if score is None else score for score in scores]

    def _ask(self, session: Any, method: str, path: str, body: bytes | None = None) -> Any:
        from requests import RequestException

        try:
            response = session.request(
                method,
                self.url + path,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=self.timeout,
                allow_redirects=False,  # a redirected POST would turn into a GET
            )
        except RequestException as error:
            raise self._failure(path, quote(error)) from error
        if method == "POST" and 400 <= response.status_code < 500 and response.status_code not in TRY_AGAIN:
            raise ValueError(
                f"RemoteReward: {self.url}{path} must accept what it is asked. Found {response.status_code} "
                f"{response.reason}: {quote(response.text)}. Mend the prompts, or send less at once: lower `request_size`."
            )
        if response.status_code != 200:
            raise self._failure(path, f"{response.status_code} {response.reason}: {quote(response.text)}")
        try:
            return response.json()
        except ValueError as error:  # its JSONDecodeError, or a number of too many digits
            raise self._garbage(path, "JSON", response.text) from error

    def _failure(self, path: str, said: str) -> ConnectionError:
        return ConnectionError(
            f"RemoteReward: {self.url}{path} must answer. Found after {1 + self.retries} tries at most: {said}. See that "
            "the server runs and what its log says; raise `timeout` if it is slow, `retries` if it restarts."
        )

    def _garbage(self, path: str, expected: str, found: Any) -> ValueError:
        return ValueError(
            f"RemoteReward: {self.url}{path} must answer {expected}. Found '{quote(found)}'. See that `url` names a server "
            "that speaks the protocol in `rewards.remote`, for instance `marble-lightning-serve`."
        )


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 can hold; NaN and true are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
