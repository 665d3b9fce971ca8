"""A thread for work that others need not wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Does what it is given, one piece of work after the other, in a thread of its own.

    The thread is a daemon: work that never ends, say a server that never answers, cannot keep the program from ending.
    (A ThreadPoolExecutor would wait for it.)
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._begun: float | None = None
        self._stopped = False
        Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work; the future holds what it returns or raises."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def stop(self) -> None:
        """Begin nothing more: what waits is never done, and the thread ends with its present piece of work."""
        self._stopped = True
        self._work.put((Future(), lambda: None))  # wakes it, should it wait for work

    @property
    def busy_for(self) -> float:
        """Seconds since the present piece of work began, 0 between two."""
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
            except BaseException as error:  # noqa: BLE001 - whoever asks the future gets it
                self._begun = None
                future.set_exception(error)
            else:
                self._begun = None
                future.set_result(result)
                del result
            del future, work  # while waiting for more, nothing of it is kept in memory
