"""Error messages of all loaders when the hub is offline, fails or refuses access."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marble_lightning.policies.pipeline_checks import pipeline_index
from marble_lightning.policies.pipeline_kinds import SD3
from rewards import Aesthetic, CLIPScore, ImageReward
from rewards.geneval.mask2former import _describe
from rewards.hub import hub_reason

pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that sets the status and X-Error-Code of all answers of a local hub; None stops the hub."""
    answer: list[Any] = [503, ""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0])
            if answer[1]:
                self.send_header("X-Error-Code", answer[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts

    stopped: list[bool] = []

    def set_answer(status: int | None, code: str = "") -> None:
        if status is None:
            stopped.append(True)
            server.shutdown()
            server.server_close()
        else:
            answer[:] = [status, code]

    yield set_answer
    if not stopped:
        set_answer(None)


LOADERS = {
    "policy": lambda: pipeline_index(SD3, "owner/name"),
    "CLIPScore": CLIPScore("owner/name").setup,
    "Aesthetic": Aesthetic(head_path="owner/name").setup,
    "ImageReward": ImageReward("owner/name").setup,
    "Mask2Former": lambda: _describe("owner/name", None),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (503, "", r"the hub failed \(status 503\), and the cache on this machine does not have it. Try again later"),
        (500, "", r"the hub failed \(status 500\)"),
        (401, "GatedRepo", r"access to it is gated. Accept its licence at http://127.*/owner/name, then log in"),
        (403, "", r"the hub refuses access \(status 403\). Log in with a token"),
        (404, "RepoNotFound", "the hub has no such repository, or it is private"),
        (404, "RevisionNotFound", "the repository has no such revision"),
        (None, "", r"http://127.* cannot be reached \(.*refused\)"),
    ],
)
def test_the_real_cause_is_reported(
    hub: Callable[..., None], loader: str, status: int | None, code: str, reason: str
) -> None:
    hub(status, code)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        LOADERS[loader]()
    assert status == 401 or "licence" not in str(error.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_offline_mode_is_reported(hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, FileNotFoundError), match="HF_HUB_OFFLINE is set.*`hf download owner/name`") as error:
        LOADERS[loader]()
    assert "licence" not in str(error.value)


def test_an_error_in_a_folder_does_not_blame_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (
        hub_reason(OSError("no config.json.\nMore."), str(tmp_path))
        == "no config.json. Check the folder, or download it again"
    )
