"""A background thread that does not keep the program alive."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs functions in a daemon thread, one after the other.

    A daemon thread lets the program end even if a function never returns, for example because a server never answers.
    (A ThreadPoolExecutor would wait for it.)
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._begun: float | None = None
        self._stopped = False
        Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a function; the future holds its return value or exception."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def stop(self) -> None:
        """Drop the queue: functions that have not started never run, and the thread ends after the current one."""
        self._stopped = True
        self._work.put((Future(), lambda: None))  # wakes a thread that waits for work

    @property
    def busy_for(self) -> float:
        """Seconds since the current function began, 0 while none runs."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def _run(self) -> None:
        while True:
            future, work = self._work.get()
            if self._stopped:
                return
            self._begun = time.monotonic()
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - the future raises it
                self._begun = None
                future.set_exception(error)
            else:
                self._begun = None
                future.set_result(result)
                del result
            del future, work  # free their memory while waiting for more work
