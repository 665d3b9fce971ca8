"""PP-OCR through RapidOCR, in this process or spread over worker threads or processes."""

import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from threading import local
from typing import Any, Literal

logger = logging.getLogger(__name__)

LINE_CANVAS = [3, 48, 96]
"""Smallest input (channels, height, width) of the recogniser where a whole image is read as one line. Wider images widen
it. Its own 320 pixels are meant for long lines and take three times as long; at 48 a square image's text touches the
edge of the canvas and first letters get lost."""

Kind = Literal["thread", "process"]


class Engine:
    """One RapidOCR engine.

    Args:
        detect: True finds lines of text and reads each, False reads the whole image as one line.
        threads: CPU threads of one recognition.
    """

    def __init__(self, detect: bool, threads: int) -> None:
        from rapidocr import RapidOCR

        params: dict[str, Any] = {
            "Global.log_level": "error",  # at "warning" it reports every image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        if not detect:
            params["Rec.rec_img_shape"] = LINE_CANVAS
        self.detect = detect
        self.engine: Any = RapidOCR(params=params)

    def read(self, pictures: Sequence[Any]) -> list[str | None]:
        """The text in each image, (H, W, BGR) of 8 bits; None where the engine failed."""
        if not self.detect:
            try:
                return list(self.engine.recognize_txt(list(pictures)).txts)
            except Exception as error:  # noqa: BLE001 - one image spoils a batch; reading them singly shows which
                logger.debug("OCR: a batch failed, reading its images one by one: %s", error)
        return [self._read_one(picture) for picture in pictures]

    def _read_one(self, picture: Any) -> str | None:
        try:
            if self.detect:
                # No orientation classifier: the published reward has none, and it would turn upside-down letters.
                return "".join(self.engine(picture, use_det=True, use_cls=False, use_rec=True).txts or ())
            return "".join(self.engine.recognize_txt([picture]).txts)
        except Exception as error:  # noqa: BLE001 - whatever the engine trips over, the image has no score
            logger.warning("OCR: the engine failed on an image, its score is missing: %s", error)
            return None


class EnginePool:
    """Several engines that share the images of a batch.

    Args:
        detect: See `Engine`.
        threads: See `Engine`.
        workers: Engines, >= 2.
        kind: Whether each has a thread or a process of its own. Threads start at once but take turns outside the network;
            processes share nothing and take a few seconds and memory of their own to start.
    """

    def __init__(self, detect: bool, threads: int, workers: int, kind: Kind) -> None:
        self.workers = workers
        options: dict[str, Any] = {"max_workers": workers, "initializer": _start, "initargs": (detect, threads)}
        if kind == "process":  # forking a process that runs threads can hang
            self.pool: Executor = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), **options)
        else:
            self.pool = ThreadPoolExecutor(**options)
        list(self.pool.map(_ready, range(workers)))  # what keeps an engine from starting shows now

    def read(self, pictures: Sequence[Any]) -> list[str | None]:
        """As `Engine.read`."""
        parts = [pictures[start :: self.workers] for start in range(min(self.workers, len(pictures)))]
        read: list[str | None] = [None] * len(pictures)
        for start, texts in enumerate(self.pool.map(_read, parts)):
            read[start :: self.workers] = texts
        return read


_own = local()
"""A worker's engine: threads of one process have one each."""


def _start(detect: bool, threads: int) -> None:
    _own.engine = Engine(detect, threads)


def _ready(_: int) -> bool:
    return isinstance(_own.engine, Engine)


def _read(pictures: Sequence[Any]) -> list[str | None]:
    engine: Engine = _own.engine
    return engine.read(pictures)
