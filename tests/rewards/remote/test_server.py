"""The reward server on a real port: scores equal local ones, health checks are answered, bad requests are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import torch

from marble_lightning.serve import main
from rewards import OCR, JPEGCompressibility, Prompt, Reward
from rewards.remote.transport import encode_png
from tests.helpers import ROOT
from tests.helpers.reward_server import PNG, PROMPT, Slow, random_images, remote, serve_reward


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


class Dropping(Reward):
    """The mean pixel, after a dropout layer that `setup` makes."""

    def setup(self) -> None:
        self.dropout = torch.nn.Dropout(0.5)

    def score(self, *, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return self.dropout(images).mean((1, 2, 3))


@pytest.mark.integration
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
    with serve_reward(JPEGCompressibility()) as url:
        scores = remote(url, request_size=2, concurrency=3)(images=images, prompts=prompts)
    assert torch.equal(scores, JPEGCompressibility()(images=images, prompts=prompts))
    assert len(scores.unique()) > 1


def test_a_served_reward_is_in_evaluation_mode() -> None:
    images, prompts, reward = random_images(3), [Prompt("a cat", "plain")] * 3, Dropping()
    reward.setup()
    with serve_reward(reward) as url:
        client = remote(url)
        scores = [client(images=images, prompts=prompts) for _ in range(2)]
    assert torch.equal(*scores)
    torch.testing.assert_close(scores[0], images.mean((1, 2, 3)))


def test_metadata_is_sent_and_missing_scores_are_null() -> None:
    prompts = [Prompt("a", "x", {"score": 0.25}), Prompt("b", "x"), Prompt("c", "x", {"score": -2.0})]
    with serve_reward(FromMetadata()) as url:
        reward = remote(url)
        scores = reward(images=random_images(3), prompts=prompts)
    torch.testing.assert_close(scores, torch.tensor([0.25, torch.nan, -2.0]), equal_nan=True)
    assert reward.missing == 1


def test_unsupported_prompts_score_null() -> None:
    reward = OCR()
    reward.setup()
    with serve_reward(reward) as url:
        answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
    assert answer.json() == {"scores": [None]}


def test_health_is_answered_while_scoring_and_requests_are_scored_one_at_a_time() -> None:
    reward = Slow()
    images, prompts = random_images(3), [Prompt("a cat", "plain")] * 3
    scores: list[torch.Tensor] = []
    with serve_reward(reward) as url:
        client = remote(url, request_size=1, concurrency=3)
        thread = threading.Thread(target=lambda: scores.append(client(images=images, prompts=prompts)))
        thread.start()
        assert reward.started.wait(5)
        assert requests.get(f"{url}/health", timeout=5).json() == {"reward": "Slow", "identity": reward.identity}
        assert reward.finished == 0
        reward.gate.set()
        thread.join(5)
    torch.testing.assert_close(scores[0], images.mean((1, 2, 3)))


def test_requests_of_clients_that_hung_up_are_not_scored() -> None:
    reward = Slow()
    with serve_reward(reward) as url:
        client = remote(url, request_size=1, concurrency=4, timeout=0.3)
        with pytest.raises(ConnectionError, match="timed out"):
            client(images=random_images(4), prompts=[Prompt("a cat", "plain")] * 4)
        assert reward.started.is_set()
        time.sleep(0.2)  # for the server to notice that the client hung up
        reward.gate.set()
        time.sleep(0.3)  # all four would have finished by now
    assert reward.finished == 1  # it had already started


def test_a_scorer_that_fails_is_a_500_with_its_message(caplog: pytest.LogCaptureFixture) -> None:
    with serve_reward(Broken()) as url:
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
    with serve_reward(Ending()) as url:
        for _ in range(2):
            answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
            assert answer.status_code == 500
            assert "`Ending` must not end the program" in answer.json()["error"]


def test_the_thread_that_scores_uses_the_gpu_of_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread uses the first one, and a reward may allocate on "cuda"."""
    chosen, seen = list[Any](), list[Any]()

    @contextmanager
    def device(gpu: torch.device) -> Iterator[None]:
        chosen.append(gpu)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    monkeypatch.setattr(JPEGCompressibility, "applies_to", lambda *_: seen.append(list(chosen)) or True)
    for gpu, expected in (("cuda:1", [torch.device("cuda:1")]), ("cpu", [])):
        with serve_reward(JPEGCompressibility(), device=gpu) as url:
            answer = requests.post(f"{url}/score", json={"images": [PNG], "prompts": [PROMPT]}, timeout=10)
        assert (answer.status_code, seen.pop(), chosen) == (200, expected, [])


def test_errors_of_other_paths_are_json(plain_url: str) -> None:
    for answer, status in (
        (requests.get(f"{plain_url}/", timeout=10), 404),
        (requests.get(f"{plain_url}/score", timeout=10), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]


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
