"""The reward server on a real port: scores equal local ones, health checks are answered, bad requests are refused."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import torch
from aiohttp import web

from marble_lightning.serve import main
from rewards import OCR, JPEGCompressibility, Prompt, RemoteReward, Reward
from rewards.remote.server import RUNNING, Limits, make_app
from rewards.remote.server_access import guard, hosts_of
from rewards.remote.transport import encode_png
from tests.helpers import ROOT

PROMPT = {"text": "a cat", "source": "plain", "metadata": {}}
PNG = encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8))


@contextmanager
def served(reward: Reward, access: Any = None, **limits: Any) -> Iterator[str]:
    """Serve `reward` in a thread of this process, and yield the URL."""
    loop, started, urls = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(make_app(reward, limits=Limits(**limits), access=access), **RUNNING)
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


class Ending(Reward):
    """Ends the program."""

    def score(self, *, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        sys.exit(0)


class Broken(Reward):
    """Fails."""

    def score(self, *, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        raise ArithmeticError("the scorer has failed")


class FromMetadata(Reward):
    """The score in the prompt's metadata; NaN if there is none."""

    def score(self, *, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return torch.tensor([prompt.metadata.get("score", torch.nan) for prompt in prompts])


def test_the_command_serves_until_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "s3cret")
    command = [sys.executable, "-m", "marble_lightning.serve", "--reward", "JPEGCompressibility", "--reward.quality", "80"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--token_variable", "MINE", "--allow_host", "gpu1"],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()  # printed after the server listens
        assert line.startswith("JPEGCompressibility on cpu at http://127.0.0.1:")
        images = torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(0))
        prompts = [Prompt("a cat", "plain")] * 5
        url = line.split()[-1]
        hosts = {
            name: requests.get(f"{url}/health", headers={"Host": name}, timeout=10).status_code for name in ("gpu1", "x")
        }
        assert hosts == {"gpu1": 401, "x": 403}
        reward = remote(url, request_size=2, token_variable="MINE")
        scores = reward(images=images, prompts=prompts)
        assert torch.equal(scores, JPEGCompressibility(quality=80)(images=images, prompts=prompts))
        server.send_signal(signal.SIGTERM)  # while the client's connections are open
        output, errors = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, output) == (0, "")
    assert "Traceback" not in errors
    with pytest.raises(ConnectionError, match="refused"):
        reward(images=images, prompts=prompts)


def test_scores_equal_local_ones() -> None:
    images, prompts = random_images(7), [Prompt("a cat", "plain")] * 7
    with served(JPEGCompressibility()) as url:
        scores = remote(url, request_size=2, concurrency=3)(images=images, prompts=prompts)
    assert torch.equal(scores, JPEGCompressibility()(images=images, prompts=prompts))
    assert len(scores.unique()) > 1


def test_metadata_is_sent_and_missing_scores_are_null() -> None:
    prompts = [Prompt("a", "x", {"score": 0.25}), Prompt("b", "x"), Prompt("c", "x", {"score": -2.0})]
    with served(FromMetadata()) as url:
        reward = remote(url)
        scores = reward(images=random_images(3), prompts=prompts)
    torch.testing.assert_close(scores, torch.tensor([0.25, torch.nan, -2.0]), equal_nan=True)
    assert reward.missing == 1


def test_unsupported_prompts_score_null() -> None:
    reward = OCR()
    reward.setup()
    with served(reward) as url:
        answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
    assert answer.json() == {"scores": [None]}


def test_health_is_answered_while_scoring_and_requests_are_scored_one_at_a_time() -> None:
    reward = Slow()
    images, prompts = random_images(3), [Prompt("a cat", "plain")] * 3
    scores: list[torch.Tensor] = []
    with served(reward) as url:
        client = remote(url, request_size=1, concurrency=3)
        thread = threading.Thread(target=lambda: scores.append(client(images=images, prompts=prompts)))
        thread.start()
        assert reward.started.wait(5)
        assert requests.get(f"{url}/health", timeout=5).json() == {"reward": "Slow"}
        assert reward.finished == 0
        reward.gate.set()
        thread.join(5)
    torch.testing.assert_close(scores[0], images.mean((1, 2, 3)))


def test_requests_of_clients_that_hung_up_are_not_scored() -> None:
    reward = Slow()
    with served(reward) as url:
        client = remote(url, request_size=1, concurrency=4, timeout=0.3)
        with pytest.raises(ConnectionError, match="timed out"):
            client(images=random_images(4), prompts=[Prompt("a cat", "plain")] * 4)
        assert reward.started.is_set()
        time.sleep(0.2)  # for the server to notice that the client hung up
        reward.gate.set()
        time.sleep(0.3)  # all four would have finished by now
    assert reward.finished == 1  # it had already started


def test_a_scorer_that_fails_is_a_500_with_its_message(caplog: pytest.LogCaptureFixture) -> None:
    with served(Broken()) as url:
        answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
        assert answer.status_code == 500
        assert answer.json() == {"error": "ArithmeticError: the scorer has failed"}
        with pytest.raises(ConnectionError, match="500 Internal Server Error: .*the scorer has failed"):
            remote(url)(images=random_images(1), prompts=[Prompt("a cat", "plain")])
        assert requests.get(f"{url}/health", timeout=10).status_code == 200  # still running
    assert "Traceback" in caplog.text


GREY = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
"""A grey PNG of one pixel."""
OTHER_SIZE = encode_png(torch.zeros(3, 4, 5, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not JSON", "the body must be JSON"),
        (b"\xff\xfe\xfd", "the body must be JSON"),
        ([], "`images` and `prompts` must be lists of the same length, not empty. Found NoneType and NoneType"),
        ({"images": [PNG]}, "Found 1 and NoneType"),
        ({"images": [], "prompts": []}, "Found 0 and 0"),
        ({"images": [PNG, PNG], "prompts": [PROMPT]}, "Found 2 and 1"),
        ({"images": [3], "prompts": [PROMPT]}, "images[0]: an image must be a base64 string. Found int"),
        ({"images": ["*"], "prompts": [PROMPT]}, "images[0]: an image must be a base64 PNG"),
        ({"images": [PNG[:60]], "prompts": [PROMPT]}, "images[0]: an image must be a base64 PNG"),
        ({"images": [GREY], "prompts": [PROMPT]}, "images[0]: an image must be an RGB PNG. Found mode L"),
        ({"images": [PNG, OTHER_SIZE], "prompts": [PROMPT] * 2}, "must be of the same size. Found [(4, 4), (4, 5)]"),
        ({"images": [PNG], "prompts": ["a cat"]}, "prompts[0] must be"),
        ({"images": [PNG], "prompts": [{"text": "a cat"}]}, "prompts[0] must be"),
        ({"images": [PNG], "prompts": [{**PROMPT, "text": 3}]}, "prompts[0] must be"),
        ({"images": [PNG], "prompts": [{**PROMPT, "metadata": []}]}, "prompts[0] must be"),
        ({"images": [PNG], "prompts": [{**PROMPT, "colour": "red"}]}, "prompts[0] must be"),
        (b'{"images": ' + b"[" * 100_000, "the body must be JSON of a few levels"),
        (b"[" + b"[]," * 340_000 + b"{}" * 330_000, "the body must hold at most 1000000 values. Found about 1010001"),
        ({"images": [PNG] * 1025, "prompts": [PROMPT] * 1025}, "`images` must hold at most 1024. Found 1025"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_requests_are_refused(plain_url: str, body: Any, message: str) -> None:
    content = {"data": body} if isinstance(body, bytes) else {"json": body}
    answer = requests.post(f"{plain_url}/score", timeout=10, **content)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_too_deep_metadata_is_a_bad_request(plain_url: str) -> None:
    deep = json.loads("[" * 200 + "]" * 200)
    body = {"images": [PNG], "prompts": [PROMPT | {"metadata": {"deep": deep}}]}
    answer = requests.post(f"{plain_url}/score", json=body, timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("prompts[0]: `metadata` must not nest more than 100")


def test_a_reward_that_ends_the_program_is_an_error() -> None:
    """The server also answers the next request."""
    with served(Ending()) as url:
        for _ in range(2):
            answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
            assert answer.status_code == 500
            assert "`Ending` must not end the program" in answer.json()["error"]


@pytest.fixture(scope="module")
def plain_url() -> Iterator[str]:
    with served(JPEGCompressibility(), max_body_mb=2) as url:
        yield url


def test_errors_of_other_paths_are_json(plain_url: str) -> None:
    for answer, status in (
        (requests.get(f"{plain_url}/", timeout=10), 404),
        (requests.get(f"{plain_url}/score", timeout=10), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]


def test_a_too_large_body_is_refused(plain_url: str) -> None:
    large = random_images(1, 1000, 1000)  # noise, so its PNG has about as many bytes as the image has values
    with pytest.raises(ValueError, match="413 .*Send fewer images, or raise --max_body_mb"):
        remote(plain_url)(images=large, prompts=[Prompt("a cat", "plain")])


def test_a_port_in_use_is_refused_before_weights_load(plain_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JPEGCompressibility, "setup", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(OSError, match="in use"):
        main(["--reward", "JPEGCompressibility", "--port", plain_url.rpartition(":")[2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reward"),
        (["--reward", "NoSuchReward"], "NoSuchReward"),
        (["--reward", "JPEGCompressibility", "--reward.path", "x"], "path"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "count", "message"), [(9000, 1, "1 of 9000 x 9000"), (1000, 17, "17 of 1000 x 1000"), (12000, 1, "1 of 12000")]
)
def test_pixels_are_counted_before_they_are_decoded(plain_url: str, side: int, count: int, message: str) -> None:
    """Black PNGs are small files. Without the limit, a 9000 x 9000 PNG took 46 seconds and 3.7 GB."""
    png = black_png(side, side)
    body = {"images": [png] * count, "prompts": [PROMPT] * count}
    start = time.monotonic()
    answer = requests.post(f"{plain_url}/score", json=body, timeout=60)
    assert time.monotonic() - start < 1
    assert answer.status_code == 400
    assert "`images` must have at most 16777216 pixels together" in answer.json()["error"]
    assert message in answer.json()["error"]


def black_png(height: int, width: int) -> str:
    """Encode a PNG with a valid header and dummy pixel data, which no test decodes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def test_a_compressed_body_is_not_expanded(plain_url: str) -> None:
    headers = {"Content-Encoding": "gzip"}
    answer = requests.post(f"{plain_url}/score", data=gzip.compress(bytes(10**6)), headers=headers, timeout=10)
    assert (answer.status_code, "must not be compressed" in answer.text) == (415, True)


def test_a_body_without_a_length_has_the_same_limit(plain_url: str) -> None:
    answer = requests.post(f"{plain_url}/score", data=iter([bytes(2**20)] * 3), timeout=10)
    assert (answer.status_code, "raise --max_body_mb" in answer.text) == (413, True)


def test_a_slow_body_times_out_and_frees_its_slot() -> None:
    with served(JPEGCompressibility(), max_requests=1, body_timeout=0.4) as url:
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
    with served(reward, max_requests=2) as url:
        with pytest.raises(ConnectionError, match="timed out"):
            remote(url, request_size=1, concurrency=5, timeout=2.0)(
                images=random_images(5), prompts=[Prompt("a cat", "plain")] * 5
            )
        assert not tasks[0].done() and max(in_memory) == 2
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
    with served(JPEGCompressibility(), guard(hosts_of(address, allowed), allowed)) as url:
        answers = [requests.get(f"{url}/health", headers=headers, timeout=10)]
        answers.append(requests.post(f"{url}/score", headers=headers, json=body, timeout=10))
    assert [answer.status_code for answer in answers] == [status] * 2
    assert status == 200 or "--allow_host" in answers[0].json()["error"]


def test_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "s3cret")
    with served(JPEGCompressibility(), guard(None, token="s3cret")) as url:
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
        (["--token_variable", "NOBODY_SETS_THIS"], "Found nothing in NOBODY_SETS_THIS"),
    ],
)
def test_limits_are_checked(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--reward", "JPEGCompressibility", *arguments])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--reward.help", "rewards.PickScore"])
    assert error.value.code == 0
    assert "Folder or hub id of the weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "Address to listen at" in output
    assert "rewards.PickScore" in output
