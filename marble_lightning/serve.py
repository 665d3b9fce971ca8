"""Any reward behind HTTP, for `rewards.RemoteReward` to ask: `marble-lightning-serve --reward rewards.PickScore`.

What is asked and answered is documented in `rewards.remote`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from aiohttp import web
from jaxtyping import Float
from jsonargparse import auto_cli
from torch import Tensor

from marble_lightning.parsers import Parser
from rewards import Prompt, Reward
from rewards.transport import decode_png

logger = logging.getLogger(__name__)

RUNNING: dict[str, Any] = {
    "access_log": None,
    "handler_cancellation": True,  # what a client no longer waits for is not scored
    "shutdown_timeout": 10.0,  # seconds that requests in flight have to end in when the server is told to stop
}
"""How aiohttp runs the application."""


class BadRequest(ValueError):
    """A request that is not as the protocol says."""


def parse(body: bytes) -> tuple[Float[Tensor, "b 3 h w"], list[Prompt]]:
    """The images and prompts of a request.

    Raises:
        BadRequest: if the body is not as the protocol says.
    """
    try:
        asked = json.loads(body)
    except ValueError as error:  # covers bytes that are no text
        raise BadRequest(f"the body must be JSON. Found something else: {error}.") from error
    images, prompts = (asked.get(name) if isinstance(asked, dict) else None for name in ("images", "prompts"))
    if not isinstance(images, list) or not isinstance(prompts, list) or not images or len(images) != len(prompts):
        found = [f"{len(part)}" if isinstance(part, list) else type(part).__name__ for part in (images, prompts)]
        raise BadRequest(
            "`images` and `prompts` must be lists of one length, not empty. "
            f"Found {found[0]} and {found[1]}. Send one prompt an image."
        )
    pictures = []
    for index, image in enumerate(images):
        try:
            pictures.append(decode_png(image))
        except ValueError as error:
            raise BadRequest(f"images[{index}]: {error}") from error
    shapes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(shapes) > 1:
        raise BadRequest(f"`images` must be of one size. Found {sorted(shapes)}. Send a request for each size.")
    return torch.stack(pictures), [to_prompt(index, prompt) for index, prompt in enumerate(prompts)]


def to_prompt(index: int, found: Any) -> Prompt:
    """A prompt of a request.

    Raises:
        BadRequest: if it has no text or source, or its metadata is no mapping.
    """
    expected = {"text": str, "source": str, "metadata": dict}
    prompt = {"metadata": {}, **found} if isinstance(found, dict) else {}
    if set(prompt) != set(expected) or not all(isinstance(prompt[name], kind) for name, kind in expected.items()):
        raise BadRequest(
            f'prompts[{index}] must be {{"text": string, "source": string, "metadata": object}}. Found {found!r:.200}.'
        )
    return Prompt(**prompt)


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """{"error": text} for whatever goes wrong: 400 for a bad request, 500 for a scorer's exception."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        remedy = " Send fewer images, or raise --max_body_mb." if error.status == 413 else ""
        return web.json_response({"error": f"{error.text or error.reason}.{remedy}"}, status=error.status)
    except BadRequest as error:
        return web.json_response({"error": str(error)}, status=400)
    except Exception as error:
        logger.exception("A request failed")
        return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)


def make_app(reward: Reward, device: str | torch.device = "cpu", max_body_mb: int = 256) -> web.Application:
    """The web application around a reward that is set up and on `device`.

    Args:
        reward: Scores one request at a time, in a thread of its own.
        device: Where it is.
        max_body_mb: Largest request in MiB.
    """
    name = type(reward).__name__
    scorer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"reward": name})

    def score_them(images: Tensor, prompts: list[Prompt]) -> list[float | None]:
        scores = reward(images=images.to(device), prompts=prompts).tolist()
        return [score if score == score else None for score in scores]

    async def score(request: web.Request) -> web.Response:
        images, prompts = await asyncio.to_thread(parse, await request.read())
        loop = asyncio.get_running_loop()
        return web.json_response({"scores": await loop.run_in_executor(scorer, score_them, images, prompts)})

    async def stop(_: web.Application) -> None:
        scorer.shutdown(cancel_futures=True)

    app = web.Application(middlewares=[errors_as_json], client_max_size=max_body_mb * 2**20)
    app.add_routes([web.get("/health", health), web.post("/score", score)])
    app.on_cleanup.append(stop)
    return app


def serve(reward: Reward, host: str = "127.0.0.1", port: int = 8000, device: str = "auto", max_body_mb: int = 256) -> None:
    """Load the reward, then answer requests until told to stop.

    Args:
        reward: what to serve; memory is bounded by its own batch_size.
        host: address to listen at. The default is seen from this machine only; 0.0.0.0 is seen by all who can reach it, and
            nobody is asked for a password.
        port: to listen at. 0: any that is free; it is printed.
        device: where to score, as "cuda:1" or "cpu". "auto": the accelerator if there is one.
        max_body_mb: largest request in MiB, >= 1.

    Raises:
        ValueError: if `max_body_mb` is below 1.
    """
    if max_body_mb < 1:
        raise ValueError(f"`max_body_mb` must be >= 1. Found {max_body_mb}. A 1024-pixel image takes about 3.")
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    # Bound before weights load, so that a port in use is noticed at once; nobody can connect until it listens.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        reward.setup()
        app = make_app(reward.to(device), device, max_body_mb)
        address = f"http://{f'[{host}]' if ':' in host else host}:{door.getsockname()[1]}"
        web.run_app(
            app,
            sock=door,
            print=lambda _: print(f"{type(reward).__name__} on {device} at {address}", flush=True),
            **RUNNING,
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    given = args if args is None else list(args)
    auto_cli(serve, args=given, as_positional=False, prog="marble-lightning-serve", parser_class=Parser)


if __name__ == "__main__":
    main()
