"""Shades of grey, and their scores by a scripted server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewards import Prompt, RemoteReward
from tests.helpers.scripted_server import ScriptedServer, remote_reward

PROMPT = Prompt("a cat", "plain")


def shades(count: int) -> torch.Tensor:
    """Return grey images with 8-bit values, each brighter than the one before."""
    return (torch.arange(count) * 5 / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def expected(count: int, text: str = PROMPT.text) -> torch.Tensor:
    """Return the scores of `shades` by `score_of`."""
    return torch.arange(count) * 5 / 255 * 0.8 + len(text) % 5 / 20


def ready(server: ScriptedServer, **arguments: Any) -> RemoteReward:
    reward = RemoteReward(server.url, **{"backoff": 0.01, "retries": 2, "timeout": 5.0, **arguments})
    reward.setup()
    return reward


def score_shades(answer: Callable[[Any], Any], count: int = 2, **arguments: Any) -> torch.Tensor:
    """Score `count` shades by a server that answers health checks normally and scoring requests by `answer(body)`."""
    with ScriptedServer(lambda path, body: remote_reward(path, body) if body is None else answer(body)) as server:
        return ready(server, **arguments)(images=shades(count), prompts=[PROMPT] * count)
