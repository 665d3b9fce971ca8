"""A real HTTP server on a free port with scripted answers, and the two interfaces that rewards use."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

DROP = object()
"""The connection closes without an answer."""
CUT = object()
"""The connection closes in the middle of an answer."""

Answer = Callable[[str, Any], Any]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: ScriptedServer

    def handle_error(self, *_: Any) -> None:
        """Ignore errors of clients that have disconnected, as some tests do."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests as the server's owner says."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.owner._open.add(self.connection)

    def finish(self) -> None:
        self.server.owner._open.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._send(self.server.owner.answer(self.path, None))

    def do_POST(self) -> None:
        owner, body = self.server.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner._lock:
            owner.requests.append(body)
            owner.headers.append(self.headers)
            owner._in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner._in_flight)
        try:
            reply = owner.answer(self.path, body)
        finally:
            with owner._lock:
                owner._in_flight -= 1
        self._send(reply)

    def _send(self, reply: Any) -> None:
        if isinstance(reply, Iterator):
            self.close_connection = True
            for part in reply:
                self.wfile.write(part)
            return
        if reply is DROP or reply is CUT:
            if reply is CUT:
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"scores": [')
            self.close_connection = True
            return
        status, content = reply if isinstance(reply, tuple) else (200, reply)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


class ScriptedServer:
    """Answers `answer(path, body)`: a mapping (200, JSON), bytes (200), (status, either), `DROP`, `CUT`, or an iterator of
    raw bytes to send.

    `requests` holds the bodies and `headers` the headers of POST requests; `most_in_flight` is the largest number of
    requests that were answered at the same time.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Any] = []
        self.headers: list[Any] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Accept no new connections, and close the open ones."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            with suppress(OSError):  # the client has closed it already
                connection.shutdown(socket.SHUT_RDWR)


def score_of(png: str, text: str) -> float:
    """A score from 0 to 1 that depends on the decoded image and the text."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    return float(pixels.mean()) / 255 * 0.8 + len(text) % 5 / 20


def remote_reward(path: str, body: Any) -> Any:
    """The protocol of `RemoteReward`."""
    if path == "/health":
        return {"reward": "Scripted"}
    assert path == "/score"
    pairs = zip(body["images"], body["prompts"], strict=True)
    return {"scores": [score_of(image, prompt["text"]) for image, prompt in pairs]}


MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"
MODEL_2 = "CodeGoat24/UnifiedReward-2.0-qwen-7b"


def chat(path: str, body: Any) -> Any:
    """OpenAI's interface, with two models: one ends its answer with a final score, the other answers three ratings.

    Both give the probabilities of the first token if they are asked for log-probabilities.
    """
    if path == "/v1/models":
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in (MODEL, MODEL_2)]
        return {"object": "list", "data": models}
    assert path == "/v1/chat/completions"
    image, question = body["messages"][0]["content"]
    png = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    if body.get("logprobs"):
        share = score_of(png, question["text"]) / 2
        return completion("Yes", {"Yes": share, "Two": share, "No": 1 - 2 * share})
    if body["model"] == MODEL_2:
        caption = question["text"].rpartition("Text Caption: [")[2].removesuffix("]")
        return completion(three_ratings(1 + 4 * score_of(png, caption)))
    caption = question["text"].rpartition("Text caption: ")[2]
    return completion(f"It shows most of it.\nFinal Score: {1 + 4 * score_of(png, caption):.4f}")


def three_ratings(rating: float) -> str:
    """An answer of UnifiedReward 2, whose mean is about `rating` and whose first rating is `rating`."""
    low, high = max(1.0, rating - 0.5), min(5.0, rating + 0.5)
    return f"Alignment Score (1-5): {rating}\nCoherence Score (1-5): {low}\nStyle Score (1-5): {high}"


def completion(text: str | None, probabilities: dict[str, float] | None = None) -> Any:
    """An answer in vLLM's format, with the probabilities of its first token."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    if probabilities is not None:
        listed = [
            {"token": token, "logprob": math.log(share), "bytes": list(token.encode())}
            for token, share in sorted(probabilities.items(), key=lambda item: -item[1])
        ]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
