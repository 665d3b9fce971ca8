"""What the reward server refuses: too large or slow requests, other hosts and origins, wrong tokens."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import struct
import time
import tracemalloc
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import requests
from aiohttp import web
from PIL.PngImagePlugin import PngImageFile

from marble_lightning.serve import main
from rewards import JPEGCompressibility, Prompt
from rewards.remote.server_access import guard, hosts_of
from rewards.remote.server_body import parse
from tests.helpers.reward_server import PNG, PROMPT, Slow, random_images, remote, serve_reward


def test_a_too_large_body_is_refused(plain_url: str) -> None:
    large = random_images(1, 1000, 1000)  # noise, so its PNG has about as many bytes as the image has values
    with pytest.raises(ValueError, match="413 .*Send fewer images, or raise --max_body_mb"):
        remote(plain_url)(images=large, prompts=[Prompt("a cat", "plain")])


@pytest.mark.parametrize(
    ("side", "count", "message"), [(9000, 1, "1 of 9000 x 9000"), (1000, 17, "17 of 1000 x 1000"), (12000, 1, "1 of 12000")]
)
def test_pixels_are_counted_before_they_are_decoded(plain_url: str, side: int, count: int, message: str) -> None:
    """Black PNGs are small files. Without the limit, a 9000 x 9000 PNG took 46 seconds and 3.7 GB."""
    png = png_of(pixels(side, side))
    body = {"images": [png] * count, "prompts": [PROMPT] * count}
    start = time.monotonic()
    answer = requests.post(f"{plain_url}/score", json=body, timeout=60)
    assert time.monotonic() - start < 1
    assert answer.status_code == 400
    assert "`images` must have at most 16777216 pixels together" in answer.json()["error"]
    assert message in answer.json()["error"]


def pixels(height: int, width: int) -> list[tuple[bytes, bytes]]:
    """The chunks of a black image. Only one pixel can be decoded."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(4)))]


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> str:
    """Encode a PNG from names and contents of its chunks but the last."""
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (*chunks, (b"IEND", b""))
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


@pytest.mark.parametrize(
    ("name", "start"),
    [("zTXt", b"\0\0"), ("iTXt", b"\0\1\0\0\0"), ("iCCP", b"\0\0")],
    ids=["text", "international text", "profile"],
)
@pytest.mark.parametrize("place", [1, 2], ids=["before the pixels", "after them"])
def test_compressed_texts_in_images_are_not_expanded(plain_url: str, name: str, start: bytes, place: int) -> None:
    """A text of 1 MiB has 1 kB, and an image may have 64 of them."""
    text, (header, data) = start + zlib.compress(bytes(2**20)), pixels(1, 1)
    texts = [(name.encode(), b"%d" % index + text) for index in range(60)]
    png = png_of([header, *texts, data] if place == 1 else [header, data, *texts])
    tracemalloc.start()
    try:
        answer = requests.post(f"{plain_url}/score", json={"images": [png], "prompts": [PROMPT]}, timeout=10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status_code == 400
    assert f"without texts and colour profile. Found a chunk '{name}'" in answer.json()["error"]
    assert peak < 2**21


def test_one_image_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, together = weakref.WeakValueDictionary[int, Any](), list[int]()

    class Opened(PngImageFile):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened[len(together)] = self
            together.append(len(opened))

    monkeypatch.setattr("rewards.remote.transport.PngImageFile", Opened)
    parse(json.dumps({"images": [PNG] * 3, "prompts": [PROMPT] * 3}).encode(), max_pixels=1000)
    assert together and max(together) == 1


def test_a_compressed_body_is_not_expanded(plain_url: str) -> None:
    headers = {"Content-Encoding": "gzip"}
    answer = requests.post(f"{plain_url}/score", data=gzip.compress(bytes(10**6)), headers=headers, timeout=10)
    assert (answer.status_code, "must not be compressed" in answer.text) == (415, True)


def test_a_body_without_a_length_has_the_same_limit(plain_url: str) -> None:
    answer = requests.post(f"{plain_url}/score", data=iter([bytes(2**20)] * 3), timeout=10)
    assert (answer.status_code, "raise --max_body_mb" in answer.text) == (413, True)


def test_a_slow_body_times_out_and_frees_its_slot() -> None:
    with serve_reward(JPEGCompressibility(), max_requests=1, body_timeout=0.4) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.1)
            assert len(remote(url)(images=random_images(1), prompts=[Prompt("a cat", "plain")])) == 1
            answer = slow.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"The body must arrive within 0.4 seconds" in answer


def test_bodies_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third request is not read while two wait for scores. One that is being scored counts until the score is there.

    Where a client hangs up, a request that has not begun to be scored makes room for the next one at once.
    """
    reward, tasks, in_memory = Slow(), list[Any](), list[int]()

    async def read_body(request: web.Request, max_bytes: int) -> bytes:
        tasks.append(asyncio.current_task())
        in_memory.append(sum(not task.done() for task in tasks))
        return await request.read()

    monkeypatch.setattr("rewards.remote.server.read_body", read_body)
    with serve_reward(reward, max_requests=2) as url:
        with pytest.raises(ConnectionError, match="timed out"):
            remote(url, request_size=1, concurrency=5, timeout=2.0)(
                images=random_images(5), prompts=[Prompt("a cat", "plain")] * 5
            )
        for _ in range(100):  # until the server has noticed that all clients are gone
            if sum(not task.done() for task in tasks) <= 1:
                break
            time.sleep(0.05)
        time.sleep(0.2)
        assert sum(not task.done() for task in tasks) == 1  # the one being scored
        assert max(in_memory) == 2
        reward.gate.set()
        assert len(remote(url)(images=random_images(1), prompts=[Prompt("a cat", "plain")])) == 1


OK = {"Host": "localhost"}


@pytest.mark.parametrize(
    ("address", "allowed", "headers", "status"),
    [
        ("127.0.0.1", [], {"Host": "localhost:80"}, 200),
        ("127.0.0.1", [], {"Host": "[::1]:80"}, 200),
        ("127.0.0.1", [], {"Host": "evil.org:80"}, 403),
        ("127.0.0.1", [], {"Host": "["}, 403),
        ("127.0.0.1", ["gpu1"], {"Host": "GPU1:80"}, 200),
        ("0.0.0.0", [], {"Host": "gpu1.lab"}, 200),
        ("0.0.0.0", ["gpu1"], {"Host": "gpu1.lab"}, 403),
        ("127.0.0.1", [], OK | {"Origin": "http://localhost"}, 200),
        ("127.0.0.1", [], OK | {"Origin": "http://localhost:3000"}, 403),
        ("0.0.0.0", [], OK | {"Origin": "https://evil.org"}, 403),
        ("127.0.0.1", [], OK | {"Origin": "null"}, 403),
        ("127.0.0.1", [], OK | {"Origin": "http://["}, 403),
        ("127.0.0.1", ["mine.org"], OK | {"Origin": "https://mine.org:1"}, 200),
    ],
)
def test_hosts_and_origins(address: str, allowed: list[str], headers: dict[str, str], status: int) -> None:
    body = {"images": [PNG], "prompts": [PROMPT]}
    with serve_reward(JPEGCompressibility(), guard(hosts_of(address, allowed), allowed)) as url:
        answers = [requests.get(f"{url}/health", headers=headers, timeout=10)]
        answers.append(requests.post(f"{url}/score", headers=headers, json=body, timeout=10))
    assert [answer.status_code for answer in answers] == [status] * 2
    assert status == 200 or "--allow_host" in answers[0].json()["error"]


def test_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "s3cret")
    with serve_reward(JPEGCompressibility(), guard(None, token="s3cret")) as url:
        assert len(remote(url, token_variable="MINE")(images=random_images(1), prompts=[Prompt("a cat", "plain")])) == 1
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            answer = requests.get(f"{url}/health", headers=headers, timeout=10)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        with pytest.raises(ConnectionError, match="401 .*must have this server's token.*Set `token_variable`"):
            remote(url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_body_mb", "0"], "`max_body_mb` must be >= 1. Found 0"),
        (["--max_pixels", "0"], "`max_pixels` must be >= 1. Found 0"),
        (["--max_requests", "0"], "`max_requests` must be >= 1. Found 0"),
        (["--body_timeout", "0"], "`body_timeout` must be > 0 seconds. Found 0"),
        (["--allow_host", "http://gpu1:8000"], "`allow_host` must hold host names .*Found 'http://gpu1:8000'. Write gpu1."),
        (["--allow_host", "GPU1:8000"], "without scheme, port and path.*Found 'gpu1:8000'. Write gpu1."),
        (["--allow_host", "['gpu1', '[::1]']"], "without brackets. Found '.::1.'. Write ::1."),
        (["--allow_host", "gpu1/score"], "Found 'gpu1/score'. Write gpu1."),
        (["--allow_host", "*"], "Found '.'. Write .."),
        (["--token_variable", "NOBODY_SETS_THIS"], "Found nothing in NOBODY_SETS_THIS"),
    ],
)
def test_limits_are_checked(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--reward", "JPEGCompressibility", *arguments])
