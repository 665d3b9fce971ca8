"""A server that several test modules ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards import JPEGCompressibility
from tests.helpers.reward_server import served


@pytest.fixture(scope="module")
def plain_url() -> Iterator[str]:
    with served(JPEGCompressibility(), max_body_mb=2) as url:
        yield url
