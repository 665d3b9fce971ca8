"""What happens where a worker of the OCR engines ends, tested without engines."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import pytest

from rewards.ocr.engine import EnginePool


class Ending:
    """A pool with a worker that ends whenever it reads."""

    def map(self, *_: object) -> None:
        raise BrokenProcessPool("terminated abruptly")


class Reading:
    """A pool that reads the same in every image."""

    def map(self, _: object, parts: list[list[object]]) -> list[list[str]]:
        return [["HELLO"] * len(part) for part in parts]


def test_workers_start_again_once_for_a_batch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pools = iter([Ending(), Reading(), Ending(), Ending(), Reading()])
    monkeypatch.setattr(EnginePool, "_start_pool", lambda self: next(pools))
    pool = EnginePool(detect=True, threads=1, workers=2, kind="process")
    assert pool.read([1, 2, 3]) == pool.read([1, 2, 3]) == ["HELLO"] * 3
    assert caplog.text.count("OCR: a worker ended (terminated abruptly). The workers start again") == 1
    pool.pool = next(pools)
    with pytest.raises(RuntimeError, match=r"^OCR: workers must run until .*ended twice: terminated abruptly\. .*`workers`"):
        pool.read([1])
    assert pool.read([1]) == ["HELLO"]  # a later batch tries again
