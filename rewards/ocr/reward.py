"""OCR: whether the image shows the quoted text of its prompt, spelled correctly."""

import re
from collections.abc import Sequence
from typing import Literal, cast
from unicodedata import normalize

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.ocr.engine import Engine, EnginePool, Kind

Quotes = Literal["straight", "all"]
"""Which double quotes mark the text to write; see `quoted_text`."""

STRAIGHT = r'(?<!\d)"([^"]*)"'
QUOTED = {"straight": re.compile(STRAIGHT), "all": re.compile(rf"{STRAIGHT}|(?<!\d)“([^“”]*)”")}
"""A quotation mark directly after a digit means inches, so it does not open a quotation."""


def quoted_text(text: str, quotes: Quotes = "straight") -> str | None:
    """Return the first text in double quotes that is not blank, or None.

    >>> quoted_text('a 24" monitor that says "Open late" at night')
    'Open late'

    Args:
        text: Text of a prompt.
        quotes: "straight", or "all" for curly quotes too.
    """
    targets = (next(filter(None, match.groups()), "") for match in QUOTED[quotes].finditer(text))
    return next((target for target in targets if target.strip()), None)


def comparable(text: str) -> str:
    """Normalise a text for comparison: remove white space and differences of case and Unicode encoding.

    NFKC unifies composed and decomposed accents, and full-width and plain letters. Case folding unifies capital and small
    letters, and a sharp s and two s.

    >>> comparable("Ｃafe\u0301 STRASSE") == comparable("CAFÉ straße")
    True
    """
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    return "".join(folded.split())


def spelling_score(target: str, read: str) -> float:
    """1 - d / len(target), with both texts normalised by `comparable`; in [0, 1].

    d = 0 if `target` is a substring of `read`, else min(Levenshtein(target, read), len(target)).

    >>> spelling_score("Hello", "HELPO")
    0.8

    Raises:
        ValueError: if `target` is blank.
    """
    target, read = comparable(target), comparable(read)
    if not target:
        raise ValueError(
            "`target` must hold at least one letter. Found blanks only. Skip prompts where `quoted_text` is None."
        )
    if target in read:
        return 1.0
    distance = min(Levenshtein.distance(read, target), len(target))
    return 1 - distance / len(target)


class OCR(Reward):
    """Text rendering: `spelling_score` between the prompt's first quoted text and the text that PP-OCR reads, 0 to 1.

    It applies only to prompts with text in double quotes. A quotation mark directly after a digit does not open a quotation.
    Pieces of text are joined from top to bottom and left to right. An image without text scores 0. If the engine fails on an
    image, its score is missing. The engine runs on the CPU and needs no download.

    Args:
        upscale_to: Pixels to which the shorter side of smaller images is enlarged before reading. None: no resizing.
        detect: True finds lines of text and reads each one. False reads the whole image as one line, over ten times as
            fast; it suits images that contain only one line of text.
        sources: Names of the prompt sets to score; prompts without quoted text are never scored. None: all. General prompts
            also quote titles and captions, so the published runs read signs of the set `ocr` only.
        batch_size: Images passed to the engine at once, >= 1.
        threads: CPU threads per recognition, >= 1.
        workers: Number of engines that divide a batch among them, >= 1.
        worker_kind: With several workers, whether each runs in its own "thread" or "process". Processes never wait for each
            other; each takes a few seconds to start and needs extra memory.
        quotes: "straight" reads text in straight double quotes only, as published; "all" in curly quotes too.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: the text-rendering reward of Flow-GRPO, Liu et al., 2025, after TextDiffuser, Chen et al., 2023.
    """

    identity_fields = (*Reward.identity_fields, "upscale_to", "detect", "quotes")

    def __init__(
        self,
        upscale_to: int | None = None,
        detect: bool = True,
        sources: list[str] | None = None,
        batch_size: int = 32,
        threads: int = 1,
        workers: int = 1,
        worker_kind: Kind = "process",
        quotes: Quotes = "straight",
    ) -> None:
        super().__init__(batch_size, sources)
        if upscale_to is not None and upscale_to < 1:
            raise ValueError(f"OCR: `upscale_to` must be >= 1 or None. Found {upscale_to}. 96 is enough for one line.")
        if threads < 1:
            raise ValueError(f"OCR: `threads` must be >= 1. Found {threads}. Use 1 if other work shares the CPU.")
        if workers < 1:
            raise ValueError(f"OCR: `workers` must be >= 1. Found {workers}. Use at most the number of free CPU cores.")
        if worker_kind not in ("thread", "process"):
            raise ValueError(f"OCR: `worker_kind` must be 'thread' or 'process'. Found {worker_kind!r}.")
        if quotes not in QUOTED:
            raise ValueError(f"OCR: `quotes` must be 'straight' or 'all'. Found {quotes!r}.")
        self.quotes = quotes
        self.upscale_to = upscale_to
        self.detect, self.threads = detect, threads
        self.workers, self.worker_kind = workers, worker_kind
        # Not an nn.Module, so it is neither moved between devices nor part of a state dict.
        self._engine: Engine | EnginePool | None = None

    def setup(self) -> None:
        """Load the engine."""
        if self._engine is None and self.workers > 1:
            self._engine = EnginePool(self.detect, self.threads, self.workers, self.worker_kind)
        elif self._engine is None:
            self._engine = Engine(self.detect, self.threads)

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has text in double quotes."""
        return quoted_text(prompt.text, self.quotes) is not None

    def read(self, images: Float[Tensor, "b 3 h w"]) -> list[str | None]:
        """Read the text in each image; None where the engine failed.

        Args:
            images: Pixels in [0, 1], float32.
        """
        height, width = images.shape[-2:]
        if self.upscale_to is not None and min(height, width) < self.upscale_to:
            factor = self.upscale_to / min(height, width)
            shape = (round(height * factor), round(width * factor))
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
        # The engine needs contiguous 8-bit (H, W, BGR).
        pixels = (images.flip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return cast(Engine | EnginePool, self._require_loaded(self._engine)).read(list(pixels))

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return 1 - d / len(target); NaN where the engine failed."""
        self._require_loaded(self._engine)
        scores = []
        for prompt, text in zip(prompts, self.read(images), strict=True):
            target = quoted_text(prompt.text, self.quotes)
            scores.append(torch.nan if target is None or text is None else spelling_score(target, text))
        return torch.tensor(scores, device=images.device)
