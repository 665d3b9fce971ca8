"""A server that several test modules ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards import JPEGCompressibility
from tests.helpers.reward_server import serve_reward


@pytest.fixture(scope="module")
def plain_url() -> Iterator[str]:
    with serve_reward(JPEGCompressibility(), max_body_mb=2) as url:
        yield url
