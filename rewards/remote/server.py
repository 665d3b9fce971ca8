"""Any reward behind HTTP, for `RemoteReward` to ask.

What is asked and answered is documented in `rewards.remote`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from aiohttp import web
from torch import Tensor

from rewards import Prompt, Reward
from rewards.redaction import strip_secrets
from rewards.remote.http_client import read_token
from rewards.remote.server_access import guard, hosts_of
from rewards.remote.server_body import BadRequest, parse, read_body
from rewards.texts import excerpt, reason

logger = logging.getLogger(__name__)


Result = TypeVar("Result")


RUNNING: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,  # a small body may expand to any size
    "handler_cancellation": True,  # what a client no longer waits for is not scored
    "shutdown_timeout": 10.0,  # seconds that requests in flight have to end in when the server is told to stop
}
"""How aiohttp runs the application."""


@dataclass(frozen=True)
class Limits:
    """What requests may take of the server.

    Args:
        max_body_mb: Largest body in MiB, >= 1.
        max_pixels: Most pixels of all images of a request together, >= 1.
        max_requests: Requests whose body is read, parsed or scored at once, >= 1; others wait.
        body_timeout: Seconds for a body to arrive, > 0.

    Raises:
        ValueError: One of them is out of range.
    """

    max_body_mb: int = 256
    max_pixels: int = 2**24
    max_requests: int = 4
    body_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, use in (
            ("max_body_mb", "A 1024-pixel image takes about 3"),
            ("max_pixels", "A 1024-pixel image has 1048576"),
            ("max_requests", "One is scored at a time; 4 are read meanwhile"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1. Found {getattr(self, name)}. {use}.")
        if not self.body_timeout > 0:
            raise ValueError(f"`body_timeout` must be > 0 seconds. Found {self.body_timeout}. Allow for slow networks.")


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """{"error": text} for whatever goes wrong: 400 for a bad request, 500 for a scorer's exception."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        remedy = " Send fewer images, or raise --max_body_mb." if error.status == 413 else ""
        headers = {name: error.headers[name] for name in ("Allow", "WWW-Authenticate") if name in error.headers}
        return web.json_response({"error": f"{error.text or error.reason}.{remedy}"}, status=error.status, headers=headers)
    except BadRequest as error:
        return web.json_response({"error": str(error)}, status=400)
    except Exception as error:
        logger.exception("A request failed")
        return web.json_response({"error": strip_secrets(f"{type(error).__name__}: {reason(error)}")}, status=500)


async def in_thread(pool: Executor, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a thread; unlike `run_in_executor`, one that is cancelled waits for what has begun.

    So a client that hangs up frees its place no sooner than the memory and the processor that its request takes.
    """
    work = pool.submit(function, *arguments)
    done = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if not work.cancel():
            await asyncio.wait([done])
        raise


def make_app(
    reward: Reward, device: str | torch.device = "cpu", limits: Limits | None = None, access: Any = None
) -> web.Application:
    """The web application around a reward that is set up and on `device`.

    Args:
        reward: Scores one request at a time, in a thread of its own.
        device: Where it is.
        limits: What requests may take; None for the defaults.
        access: A middleware that refuses requests, see `server_access.guard`; None refuses other sites' pages.
    """
    name, limits = type(reward).__name__, limits or Limits()
    scorer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    parser = ThreadPoolExecutor(max_workers=limits.max_requests, thread_name_prefix="parse")
    places = asyncio.Semaphore(limits.max_requests)

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"reward": name})

    def score_them(images: Tensor, prompts: list[Prompt]) -> list[float | None]:
        try:
            scores = reward(images=images.to(device), prompts=prompts).tolist()
        except SystemExit as error:  # the server would end as if all were well
            raise RuntimeError(
                f"`{name}` must not end the program. Found {excerpt(error)}; raise another error where it cannot go on."
            ) from error
        return [score if score == score else None for score in scores]

    async def parsed(request: web.Request) -> tuple[Tensor, list[Prompt]]:
        try:
            async with asyncio.timeout(limits.body_timeout):
                body = await read_body(request, limits.max_body_mb * 2**20)
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text=f"The body must arrive within {limits.body_timeout:g} seconds") from error
        return await in_thread(parser, parse, body, limits.max_pixels)

    async def score(request: web.Request) -> web.Response:
        async with places:  # until it is scored: what waits for that is in memory too
            return web.json_response({"scores": await in_thread(scorer, score_them, *await parsed(request))})

    async def stop(_: web.Application) -> None:
        scorer.shutdown(cancel_futures=True)
        parser.shutdown(cancel_futures=True)

    app = web.Application(middlewares=[errors_as_json, access or guard(None)])
    app.add_routes([web.get("/health", health), web.post("/score", score)])
    app.on_cleanup.append(stop)
    return app


def serve(
    reward: Reward,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    max_body_mb: int = 256,
    max_pixels: int = 2**24,
    max_requests: int = 4,
    body_timeout: float = 60.0,
    allow_host: list[str] | str | None = None,
    token_variable: str | None = None,
) -> None:
    """Load the reward, then answer requests until told to stop.

    Args:
        reward: what to serve; memory is bounded by its own batch_size.
        host: address to listen at. The default is seen from this machine only; 0.0.0.0 is seen by all who can reach it, of
            whom nothing but `token_variable` asks for a token.
        port: to listen at. 0: any that is free; it is printed.
        device: where to score, as "cuda:1" or "cpu". "auto": the accelerator if there is one.
        max_body_mb: largest request in MiB, >= 1.
        max_pixels: most pixels of all images of a request together, >= 1; counted before they are decoded, which takes up
            to 20 bytes a pixel. The default is 16 images of 1024 x 1024.
        max_requests: requests that are read, decoded or wait for their scores at once, >= 1; others wait unread.
        body_timeout: seconds for a request to arrive, > 0.
        allow_host: one or more names by which this server may be asked for (the header Host), and sites for whose pages a
            browser may ask (Origin). Pages of other sites are always refused; other names are refused at a loopback address
            and wherever this is given.
        token_variable: name of an environment variable with the token that requests must bring, as `RemoteReward` does with
            its `token_variable`. None: all may ask. Tokens travel as they are: use a network that is yours, or a proxy
            with TLS.

    Raises:
        ValueError: if a limit is out of range, or the variable is not set.
    """
    limits = Limits(max_body_mb, max_pixels, max_requests, body_timeout)
    token = read_token("marble-lightning-serve", token_variable)
    allowed = [name.lower() for name in ([allow_host] if isinstance(allow_host, str) else allow_host or [])]
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    # Bound before weights load, so that a port in use is noticed at once; nobody can connect until it listens.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        reward.setup()
        app = make_app(reward.to(device), device, limits, guard(hosts_of(host, allowed), allowed, token))
        address = f"http://{f'[{host}]' if ':' in host else host}:{door.getsockname()[1]}"
        web.run_app(
            app,
            sock=door,
            print=lambda _: print(f"{type(reward).__name__} on {device} at {address}", flush=True),
            **RUNNING,
        )
