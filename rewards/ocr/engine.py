"""PP-OCR through RapidOCR, in this process or in several worker threads or processes."""

import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from threading import local
from typing import Any, Literal

logger = logging.getLogger(__name__)

LINE_CANVAS = [3, 48, 96]
"""Smallest recogniser input (channels, height, width) if a whole image is read as one line. Wider images widen it. The
engine's default width of 320 pixels is meant for long lines and takes three times as long. At a width of 48 the text of a
square image touches the edge of the canvas and first letters get lost."""

Kind = Literal["thread", "process"]


class Engine:
    """One RapidOCR engine.

    Args:
        detect: True finds lines of text and reads each one; False reads the whole image as one line.
        threads: CPU threads per recognition.
    """

    def __init__(self, detect: bool, threads: int) -> None:
        from rapidocr import RapidOCR

        params: dict[str, Any] = {
            "Global.log_level": "error",  # at "warning" the engine reports every image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        if not detect:
            params["Rec.rec_img_shape"] = LINE_CANVAS
        self.detect = detect
        self.engine: Any = RapidOCR(params=params)

    def read(self, images: Sequence[Any]) -> list[str | None]:
        """Read the text in each 8-bit (H, W, BGR) image; None where the engine failed."""
        if not self.detect:
            try:
                return list(self.engine.recognize_txt(list(images)).txts)
            except Exception as error:  # noqa: BLE001 - one bad image fails the batch; reading one by one finds it
                logger.debug("OCR: a batch failed, reading its images one by one: %s", error)
        return [self._read_one(image) for image in images]

    def _read_one(self, image: Any) -> str | None:
        try:
            if self.detect:
                # No orientation classifier: the published reward has none, and it would rotate upside-down letters.
                return "".join(self.engine(image, use_det=True, use_cls=False, use_rec=True).txts or ())
            return "".join(self.engine.recognize_txt([image]).txts)
        except Exception as error:  # noqa: BLE001 - after any engine error the score of the image is missing
            logger.warning("OCR: the engine failed on an image, its score is missing: %s", error)
            return None


class EnginePool:
    """Several engines that divide the images of a batch among them.

    Args:
        detect: See `Engine`.
        threads: See `Engine`.
        workers: Number of engines, >= 2.
        kind: Whether each engine runs in its own thread or process. Threads start immediately but run one at a time outside
            the network. Processes share nothing; each takes a few seconds to start and needs extra memory.
    """

    def __init__(self, detect: bool, threads: int, workers: int, kind: Kind) -> None:
        self.detect, self.threads, self.workers, self.kind = detect, threads, workers, kind
        self.pool = self._start_pool()

    def _start_pool(self) -> Executor:
        options: dict[str, Any] = {"initializer": _start, "initargs": (self.detect, self.threads)}
        pool: Executor
        if self.kind == "process":  # spawn, because forking a process with threads can hang
            pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), **options)
        else:
            pool = ThreadPoolExecutor(self.workers, **options)
        list(pool.map(_ready, range(self.workers)))  # errors at the start of an engine are raised here
        return pool

    def read(self, images: Sequence[Any]) -> list[str | None]:
        """Read the text in each image, as `Engine.read`. If a worker ends, all start again and read the batch again, once.

        Raises:
            RuntimeError: if a worker ends again.
        """
        try:
            return self._read(images)
        except BrokenExecutor as error:
            logger.warning("OCR: a worker ended (%s). The workers start again and read the batch again.", error)
        try:
            self.pool = self._start_pool()
            return self._read(images)
        except BrokenExecutor as error:
            raise RuntimeError(
                f"OCR: workers must run until they have read a batch. Found one that ended twice: {error}. Free memory or "
                "lower `workers`; `workers: 1` reads in the main process."
            ) from error

    def _read(self, images: Sequence[Any]) -> list[str | None]:
        parts = [images[start :: self.workers] for start in range(min(self.workers, len(images)))]
        texts: list[str | None] = [None] * len(images)
        for start, part_texts in enumerate(self.pool.map(_read, parts)):
            texts[start :: self.workers] = part_texts
        return texts


_worker = local()
"""Thread-local storage with the engine of a worker, so that each thread has its own."""


def _start(detect: bool, threads: int) -> None:
    _worker.engine = Engine(detect, threads)


def _ready(_: int) -> bool:
    return isinstance(_worker.engine, Engine)


def _read(images: Sequence[Any]) -> list[str | None]:
    engine: Engine = _worker.engine
    return engine.read(images)
