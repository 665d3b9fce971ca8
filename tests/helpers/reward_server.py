"""A reward server in a thread, and what its tests send to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from aiohttp import web

from rewards import Prompt, RemoteReward, Reward
from rewards.remote.server import RUNNING, Limits, make_app
from rewards.remote.transport import encode_png

PROMPT = {"text": "a cat", "source": "plain", "metadata": {}}


PNG = encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8))


@contextmanager
def serve_reward(reward: Reward, access: Any = None, device: str = "cpu", **limits: Any) -> Iterator[str]:
    """Serve `reward` in a thread of this process, and yield the URL."""
    loop, started, urls = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(make_app(reward, device, Limits(**limits), access), **RUNNING)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        urls.append(f"http://{host}:{port}")
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def remote(url: str, **arguments: Any) -> RemoteReward:
    reward = RemoteReward(url, **{"retries": 0, "timeout": 10.0, **arguments})
    reward.setup()
    return reward


def random_images(count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    """Return random images with 8-bit pixel values."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * 255).round() / 255


class Slow(Reward):
    """The mean pixel, after the gate opens; minus one if two calls run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.gate = threading.Event(), threading.Event()
        self.running = self.finished = 0

    def score(self, *, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        self.running += 1
        self.started.set()
        assert self.gate.wait(10)
        time.sleep(0.05)  # time for a second call to start, if that is possible
        alone = self.running == 1
        self.running -= 1
        self.finished += 1
        return images.mean((1, 2, 3)) if alone else -torch.ones(len(images))
