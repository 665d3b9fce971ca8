"""The base class of rewards: prompts, checks of inputs and scores, and missing scores."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.frozen import freeze
from rewards.redaction import redact

RANGE_TOLERANCE = 1e-3
"""How far outside [0, 1] a pixel may lie. It allows for the rounding of a half-precision decoder."""

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A caption with its prompt set and metadata. It is immutable, because all rewards share it.

    Args:
        text: The caption the image was generated from.
        source: Name of the prompt set, for rewards that score only some sets and for logging per set.
        metadata: Information for rewards beyond the caption, for instance the objects that `GenEval` must find. The prompt
            keeps an immutable copy.

    Raises:
        ValueError: if mappings and lists of `metadata` nest more than 100 levels deep.
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


def identity_of(reward_model: object, identity_fields: Sequence[str]) -> dict[str, str]:
    """Return the class of a reward model and its attributes among `identity_fields`, as text without secrets."""
    attributes = {name: str(getattr(reward_model, name)) for name in identity_fields if hasattr(reward_model, name)}
    return {"class": public_name(type(reward_model))} | redact(attributes)  # results are shared


def public_name(kind: type) -> str:
    """Return the name by which users import a class.

    It is the package's name and the class name if the package exports the class, so that moving a file changes no identity.
    """
    exported = getattr(sys.modules["rewards"], kind.__qualname__, None)
    return f"{'rewards' if exported is kind else kind.__module__}.{kind.__qualname__}"


class Reward(nn.Module, ABC):
    """A frozen scorer of (image, prompt) pairs. Subclass it, override `score`, and name the subclass in a config.

    Calling the reward scores a batch: `reward(images=images, prompts=prompts)`. A sample reaches `score` only if its prompt
    belongs to one of the `sources` and passes `applies_to`. `score` receives at most `batch_size` samples at a time. All
    other samples are NaN. Arguments are keyword-only because swapping prompts and images would cause silent errors.

    Args:
        batch_size: Samples passed to `score` at once, >= 1. None keeps the `batch_size` of the class.
        sources: Names of the prompt sets to score. None: all.

    Raises:
        ValueError: if `batch_size` is below 1, or `sources` is empty.
    """

    batch_size: int = 32
    identity_fields: tuple[str, ...] = ("path", "revision", "file", "dtype", "sources")
    """Attributes that the scores depend on. Missing ones are ignored. Results of runs that differ in one are kept apart."""
    identity_defaults: ClassVar[Mapping[str, Any]] = {}
    """Further attributes that the scores depend on, by name, with their defaults. Only those with another value than the
    default and None are part of `identity`, so that results from before they were named stay comparable."""
    _missing: int = 0

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
        """Load weights. It is safe to call this twice. The base class has nothing to load."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether this reward can score images of `prompt`. Default: every prompt."""
        return True

    def supports(self, prompt: Prompt) -> bool:
        """Whether this reward scores `prompt`: its source is among `sources` and `applies_to` holds. Do not override it."""
        return (self.sources is None or prompt.source in self.sources) and self.applies_to(prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        """Reject a prompt that this reward applies to but can never score, before weights load. Default: accept all.

        Raises:
            ValueError: with the cause and its remedy.
        """

    def tag(self, prompt: Prompt) -> str | None:
        """Return the category of a prompt; held-out scores are also averaged per category. Default: None, no categories."""
        return None

    @abstractmethod
    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Score each image against its own prompt; higher is better.

        Args:
            images: Pixels in [0, 1], float32.
            prompts: One prompt per image; `supports` is true for each.

        Returns:
            One score per pair, converted to float32. NaN marks a missing score. Scores that are infinite in float32 are
            rejected.
        """

    @torch.no_grad()
    def forward(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Score a batch in evaluation mode; samples that the reward does not apply to or cannot score are NaN.

        Args:
            images: Floating point pixels, finite and in [0, 1].
            prompts: One prompt per image.

        Shape:
            - images: (B, 3, H, W)
            - result: (B,), float32, on the device of `images`

        Raises:
            TypeError: if `images` is not a floating point tensor, `prompts` holds an object that is not a `Prompt`, or
                `score` does not return a tensor of real numbers.
            ValueError: if shapes, lengths or values differ from the above, or `score` returns a wrong shape or a value that
                is infinite in float32.
        """
        self._check_inputs(images, prompts)
        self.eval()  # whoever calls; modules that `setup` has made are in training mode
        scores = torch.full((len(prompts),), torch.nan, dtype=torch.float32, device=images.device)
        applicable = [index for index, prompt in enumerate(prompts) if self.supports(prompt)]
        # A mixed-precision trainer must not change scores, so scoring disables autocast.
        with torch.autocast(device_type=images.device.type, enabled=False):
            for start in range(0, len(applicable), self.batch_size):
                indices = applicable[start : start + self.batch_size]
                batch = images[indices].float().clamp(0, 1)
                result = self.score(images=batch, prompts=[prompts[index] for index in indices])
                scores[indices] = batch_scores = self._check_scores(result, len(indices)).to(scores.device)
                self._missing += int(batch_scores.isnan().sum())
        return scores

    @property
    def missing(self) -> int:
        """Number of samples that this reward applied to but scored NaN, since it was built."""
        return self._missing

    def train(self, mode: bool = True) -> "Reward":
        """Stay in eval mode: a trainer switches its children to train mode, which would enable dropout in a reward model."""
        return super().train(False)

    @property
    def identity(self) -> dict[str, str]:
        """The class and the attributes that the scores depend on (`identity_fields`, `identity_defaults`), as text."""
        defaults = self.identity_defaults.items()
        changed = [name for name, default in defaults if getattr(self, name, None) not in (None, default)]
        return identity_of(self, (*self.identity_fields, *changed))

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require_loaded(self, part: T | None) -> T:
        """Return `part`, or raise an error that says to call `setup` first."""
        if part is None:
            raise RuntimeError(
                f"{self._name}: weights must be loaded before scoring. Found none. Call `setup()` once, then `to(device)`."
            )
        return part

    def _check_inputs(self, images: Any, prompts: Any) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise TypeError(
                f"{self._name}: `images` must be a floating point tensor. Found {kind}. Divide 8-bit pixels by 255."
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self._name}: `images` must have shape (B, 3, H, W). Found {tuple(images.shape)}. "
                "Put channels second and add a batch dimension."
            )
        other = next((prompt for prompt in prompts if not isinstance(prompt, Prompt)), None)
        if other is not None:
            raise TypeError(
                f"{self._name}: `prompts` must hold `Prompt` objects. Found {type(other).__name__}. "
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
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # the negation also rejects NaN
            raise ValueError(
                f"{self._name}: `images` must be finite and in [0, 1]. Found values from {low:.4g} to {high:.4g}. "
                "Map decoder output x in [-1, 1] to x / 2 + 0.5 and clamp it."
            )

    def _check_scores(self, result: Any, expected: int) -> Float[Tensor, " b"]:
        """Check the result of `score` and return it in float32."""
        if not isinstance(result, Tensor) or result.is_complex():
            cls = type(result)
            kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"{cls.__module__}.{cls.__qualname__}"
            raise TypeError(
                f"{self._name}: `score` must return a tensor of {expected} real numbers, one per image. Found "
                f"{kind.removeprefix('builtins.')}. Convert it: torch.as_tensor(scores)."
            )
        if result.shape != (expected,):
            raise ValueError(
                f"{self._name}: `score` must return a tensor of shape ({expected},), one score per image. Found "
                f"{tuple(result.shape)}. Reduce over every dimension but the first."
            )
        scores = result.float()
        if scores.isinf().any():
            raise ValueError(
                f"{self._name}: `score` must return numbers that are finite in float32, or NaN where a score is missing. "
                f"Found {result[scores.isinf()][0].item()}. Scale scores down, and return NaN for samples that cannot be "
                "scored."
            )
        return scores
