"""What every reward shares: the prompt it reads, the checks around its scores, and what a missing score is."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.deprecated import Renamed, adopt_old_names
from rewards.frozen import frozen
from rewards.redaction import redacted

RANGE_TOLERANCE = 1e-3
"""How far outside [0, 1] a pixel may lie: room for a half-precision decoder's rounding, not for images in [-1, 1]."""

FULL_NAME = re.compile(r"(?<![\w.])rewards\.(?:[a-z_0-9]+\.)+(\w+)")

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A caption with where it came from and what is known about it. Rewards share it, so nothing in it can be changed.

    Args:
        text: the caption the image was made from.
        source: name of the prompt set, for rewards that judge only some sets and for logging per set.
        metadata: what a reward needs to know beyond the caption, for instance the objects `GenEval` should find. Kept as a
            copy whose mappings and lists refuse to change.

    Raises:
        ValueError: if more than 100 mappings and lists of `metadata` are within each other.
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", frozen(self.metadata))


def identity_of(reward_model: object, identity_fields: Sequence[str]) -> dict[str, str]:
    """The class of a judge and those of the attributes named that it has, as text without secrets."""
    own = {name: str(getattr(reward_model, name)) for name in identity_fields if hasattr(reward_model, name)}
    return {"class": public_name(type(reward_model))} | redacted(own)  # results are shared


def public_name(kind: type) -> str:
    """A class as users name it: by its package where that exports it, so that moving a file changes no identity."""
    package = kind.__module__.partition(".")[0]
    exported = getattr(sys.modules.get(package), kind.__qualname__, None)
    return f"{package if exported is kind else kind.__module__}.{kind.__qualname__}"


def with_public_names(text: str) -> str:
    """A text of earlier results or checkpoints, which named the module of a reward too, with `public_name` instead.

    >>> with_public_names("rewards.pickscore.PickScore"), with_public_names("mine.rewards.PickScore")
    ('rewards.PickScore', 'mine.rewards.PickScore')
    """
    exported = sys.modules["rewards"]
    return FULL_NAME.sub(lambda found: f"rewards.{found[1]}" if hasattr(exported, found[1]) else found[0], text)


class Reward(nn.Module, ABC):
    """A frozen judge of (image, prompt) pairs. Subclass it, override `score`, and it is ready to be named in a config.

    Calling the reward scores a batch: `reward(images=images, prompts=prompts)`. Only samples whose prompt is of its
    `sources` and passes `applies_to` reach `score`, at most `batch_size` at a time; all others are NaN. Arguments are
    keyword-only because scorers called as (prompts, images) go wrong silently.

    Args:
        batch_size: samples handed to `score` at once, >= 1. None keeps the class's own `batch_size`.
        sources: names of the prompt sets it judges. None: all.

    Raises:
        ValueError: if `batch_size` is below 1, or `sources` is empty.
    """

    batch_size: int = 32
    identity_fields: tuple[str, ...] = ("path", "revision", "file", "dtype", "sources")
    """Attributes that its scores depend on, those of them that it has; results of runs that differ in one are told apart."""
    scored_by, judges = Renamed("identity_fields"), Renamed("supports")
    _missing: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        adopt_old_names(cls)

    def __init__(self, batch_size: int | None = None, sources: Sequence[str] | None = None) -> None:
        super().__init__()
        if sources is not None and (isinstance(sources, str) or not sources):
            raise ValueError(
                f"{self._name}: `sources` must be a list that names a prompt set, or None for all. Found {sources!r}."
            )
        self.sources = sources
        if batch_size is not None:
            if batch_size < 1:
                raise ValueError(
                    f"{self._name}: `batch_size` must be >= 1. Found {batch_size}. Lower it only as far as memory demands."
                )
            self.batch_size = batch_size

    def setup(self) -> None:
        """Load weights. Safe to call twice; the base has nothing to load."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether this reward can judge images of `prompt`. Default: every prompt."""
        return True

    def supports(self, prompt: Prompt) -> bool:
        """Whether this reward does: `prompt` is of one of its sources, and it applies to it. Not to be overridden."""
        return (self.sources is None or prompt.source in self.sources) and self.applies_to(prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        """Reject a prompt this reward applies to but could never judge, before any weight loads. Default: nothing.

        Raises:
            ValueError: with what is wrong and its remedy.
        """

    def tag(self, prompt: Prompt) -> str | None:
        """What kind of prompt this is, where held-out scores are also wanted kind by kind. Default: None, all are alike."""
        return None

    @abstractmethod
    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """Judge each image against its own prompt, higher is better.

        Args:
            images: float32 pixels in [0, 1].
            prompts: one per image; `supports` holds for each.

        Returns:
            One score per pair, which becomes float32. NaN marks a score that could not be had; what is infinite in float32
            is rejected.
        """

    @torch.no_grad()
    def forward(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """Score a batch; NaN where the reward does not apply or has no score.

        Args:
            images: floating point pixels, finite and in [0, 1].
            prompts: one per image.

        Shape:
            - images: (B, 3, H, W)
            - result: (B,), float32, on the device of `images`

        Raises:
            TypeError: if `images` is not a floating point tensor, `prompts` holds something else than `Prompt`, or `score`
                returns something else than a tensor of real numbers.
            ValueError: if shapes, lengths or values are not as above, or `score` returns a wrong shape or what is infinite
                in float32.
        """
        self._check_inputs(images, prompts)
        scores = torch.full((len(prompts),), torch.nan, dtype=torch.float32, device=images.device)
        applicable = [index for index, prompt in enumerate(prompts) if self.supports(prompt)]
        # A mixed-precision trainer must not change what a reward says, so scoring leaves autocast.
        with torch.autocast(device_type=images.device.type, enabled=False):
            for start in range(0, len(applicable), self.batch_size):
                chosen = applicable[start : start + self.batch_size]
                batch = images[chosen].float().clamp(0, 1)
                result = self.score(images=batch, prompts=[prompts[index] for index in chosen])
                scores[chosen] = narrowed = self._narrowed(result, len(chosen)).to(scores.device)
                self._missing += int(narrowed.isnan().sum())
        return scores

    @property
    def missing(self) -> int:
        """How many samples this reward applied to and yet gave NaN, since it was built."""
        return self._missing

    def train(self, mode: bool = True) -> "Reward":
        """Stay in eval mode: a trainer switches its children to train mode, which would turn on a judge's dropout."""
        return super().train(False)

    @property
    def identity(self) -> dict[str, str]:
        """Its class and what its scores depend on (`identity_fields`), as text."""
        return identity_of(self, self.identity_fields)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _loaded(self, part: T | None) -> T:
        """`part`, or an error that says to call `setup` first."""
        if part is None:
            raise RuntimeError(
                f"{self._name}: weights must be loaded before scoring. Found none. Call `setup()` once, then `to(device)`."
            )
        return part

    def _check_inputs(self, images: Any, prompts: Any) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            found = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise TypeError(
                f"{self._name}: `images` must be a floating point tensor. Found {found}. Divide 8-bit pixels by 255."
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self._name}: `images` must have shape (B, 3, H, W). Found {tuple(images.shape)}. "
                "Put channels second and add a batch dimension."
            )
        odd = next((prompt for prompt in prompts if not isinstance(prompt, Prompt)), None)
        if odd is not None:
            raise TypeError(
                f"{self._name}: `prompts` must hold `Prompt` objects. Found {type(odd).__name__}. "
                "Wrap texts: Prompt(text=..., source=...)."
            )
        if len(prompts) != len(images):
            raise ValueError(
                f"{self._name}: `prompts` must hold one prompt per image. Found {len(prompts)} prompts for "
                f"{len(images)} images. Repeat a prompt for each of its images."
            )
        if not images.numel():
            return
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # written so that NaN fails too
            raise ValueError(
                f"{self._name}: `images` must be finite and in [0, 1]. Found values from {low:.4g} to {high:.4g}. "
                "Map decoder output x in [-1, 1] to x / 2 + 0.5 and clamp it."
            )

    def _narrowed(self, result: Any, expected: int) -> Float[Tensor, "b"]:
        """Scores in float32, once they are known to be scores in float32 too."""
        if not isinstance(result, Tensor) or result.is_complex():
            kind = type(result)
            found = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(
                f"{self._name}: `score` must return a tensor of {expected} real numbers, one an image. Found "
                f"{found.removeprefix('builtins.')}. Convert it: torch.as_tensor(scores)."
            )
        if result.shape != (expected,):
            raise ValueError(
                f"{self._name}: `score` must return a tensor of shape ({expected},), one score an image. Found "
                f"{tuple(result.shape)}. Reduce over every dimension but the first."
            )
        narrowed = result.float()
        if narrowed.isinf().any():
            raise ValueError(
                f"{self._name}: `score` must return numbers that are finite in float32, or NaN where a score is missing. "
                f"Found {result[narrowed.isinf()][0].item()}. Scale scores down, and return NaN for samples that cannot be "
                "judged."
            )
        return narrowed
