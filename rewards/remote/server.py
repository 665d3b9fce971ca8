"""The HTTP server of a reward, the counterpart of `RemoteReward`.

`rewards.remote` documents the protocol.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from aiohttp import web
from torch import Tensor

from rewards import Prompt, Reward
from rewards.redaction import strip_secrets
from rewards.remote.addresses import read_token
from rewards.remote.server_access import check_hosts, guard, hosts_of
from rewards.remote.server_body import BadRequest, parse, read_body
from rewards.texts import excerpt, reason

logger = logging.getLogger(__name__)


Result = TypeVar("Result")


RUNNING: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,  # a small body may expand to any size
    "handler_cancellation": True,  # requests of clients that hung up are not scored
    "shutdown_timeout": 10.0,  # seconds for running requests to finish after a stop signal
}
"""Options of aiohttp's application runner."""


@dataclass(frozen=True)
class Limits:
    """Limits on requests to the server.

    Args:
        max_body_mb: Maximum size of a request body in MiB, >= 1.
        max_pixels: Maximum number of pixels of all images of a request together, >= 1.
        max_requests: Maximum number of requests that are read, parsed or scored at once, >= 1; others wait.
        body_timeout: Seconds for a body to arrive, > 0.

    Raises:
        ValueError: if a limit is out of range.
    """

    max_body_mb: int = 256
    max_pixels: int = 2**24
    max_requests: int = 4
    body_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, use in (
            ("max_body_mb", "A 1024-pixel image takes about 3"),
            ("max_pixels", "A 1024-pixel image has 1048576"),
            ("max_requests", "The default is 4; one request is scored at a time"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1. Found {getattr(self, name)}. {use}.")
        if not self.body_timeout > 0:
            raise ValueError(f"`body_timeout` must be > 0 seconds. Found {self.body_timeout}. Allow for slow networks.")


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer errors as {"error": text}: status 400 for a bad request, 500 for an exception of the scorer."""
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
    """Run `function(*arguments)` in a thread; unlike `run_in_executor`, cancellation waits for a call that has started.

    A client that hangs up therefore frees its slot only after its request has released memory and processor.
    """
    future = pool.submit(function, *arguments)
    async_future = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(async_future)
    except asyncio.CancelledError:
        if not future.cancel():
            await asyncio.wait([async_future])
        raise


def make_app(
    reward: Reward, device: str | torch.device = "cpu", limits: Limits | None = None, access: Any = None
) -> web.Application:
    """Build the web application for a reward that is set up and on `device`.

    Args:
        reward: The reward to serve. It scores one request at a time, in a separate thread.
        device: Device of the reward.
        limits: Limits on requests. None: the defaults.
        access: A middleware that refuses requests, see `server_access.guard`. None: refuse other sites' pages.
    """
    name, place, limits = type(reward).__name__, torch.device(device), limits or Limits()
    about = {"reward": name, "identity": reward.identity}
    scorer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    parser = ThreadPoolExecutor(max_workers=limits.max_requests, thread_name_prefix="parse")
    slots = asyncio.Semaphore(limits.max_requests)

    async def health(_: web.Request) -> web.Response:
        return web.json_response(about)

    def run_reward(images: Tensor, prompts: list[Prompt]) -> list[float | None]:
        try:
            with torch.cuda.device(place) if place.type == "cuda" else nullcontext():  # a new thread uses the first GPU
                scores = reward(images=images.to(place), prompts=prompts).tolist()
        except SystemExit as error:  # it would end the server without an error
            raise RuntimeError(
                f"`{name}` must not end the program. Found {excerpt(error)}. Raise another error on failure."
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
        async with slots:  # held until the request is scored, because waiting requests also use memory
            return web.json_response({"scores": await in_thread(scorer, run_reward, *await parsed(request))})

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
    """Load a reward and answer requests until the process receives a stop signal.

    Args:
        reward: The reward to serve. Its batch_size bounds its memory.
        host: Address to listen at. The default is reachable from this machine only. 0.0.0.0 is reachable from the network;
            only `token_variable` then protects the server.
        port: Port to listen at. 0: any free port, which is printed.
        device: Device for scoring, such as "cuda:1" or "cpu". "auto": the accelerator if there is one.
        max_body_mb: Maximum size of a request in MiB, >= 1.
        max_pixels: Maximum number of pixels of all images of a request together, >= 1. They are counted before decoding,
            which takes up to 20 bytes per pixel. The default is 16 images of 1024 x 1024.
        max_requests: Maximum number of requests that are read, decoded or waiting for scores at once, >= 1; others wait
            unread.
        body_timeout: Seconds for a request to arrive, > 0.
        allow_host: One or more host names, without scheme and port. They are allowed in the Host header, and as sites with
            pages that may send requests from a browser (Origin). Pages of other sites are always refused. Other Host names
            are refused at a loopback address, and at any address if this option is given.
        token_variable: Name of an environment variable with the token that requests must have; `RemoteReward` sends it with
            its `token_variable`. None: no token is required. Tokens are sent unencrypted: use a trusted network, or a proxy
            with TLS.

    Raises:
        ValueError: if a limit is out of range, a name in `allow_host` is no host name, or the variable is not set.
    """
    limits = Limits(max_body_mb, max_pixels, max_requests, body_timeout)
    token = read_token("marble-lightning-serve", token_variable)
    allowed = check_hosts([allow_host] if isinstance(allow_host, str) else allow_host or [])
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    # Bind before weights load, so that a port in use fails early. No client can connect until the socket listens.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        reward.setup()
        app = make_app(reward.to(device), device, limits, guard(hosts_of(host, allowed), allowed, token))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        web.run_app(
            app,
            sock=listener,
            print=lambda _: print(f"{type(reward).__name__} on {device} at {address}", flush=True),
            **RUNNING,
        )
