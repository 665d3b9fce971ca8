"""The interface between `GenEval` and object detectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Args:
        label: Class name, spelled as in the prompts' metadata.
        score: Confidence in [0, 1].
        box: Corners (x0, y0, x1, y1) in pixels, x to the right and y downwards.
        mask: Boolean array or tensor of shape (H, W), True on the object, or None.
        colour: Name of the object's colour if the detector knows it, or None.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None
    colour: str | None = None


class Detector(nn.Module, ABC):
    """Detect objects and name their colours. Subclass it, override `detect`, and pass it to `GenEval`."""

    classes: frozenset[str] | None = None
    """Names of the classes it can detect; None if they are not known in advance."""
    colour_names: frozenset[str] | None = None
    """Names of the colours it can return; None if they are not known in advance."""
    min_score: float = 0.0
    """Candidates with a score <= `min_score` are not returned."""
    identity_fields: tuple[str, ...] = ("path", "revision", "dtype", "min_score")
    """Attributes that the detections depend on, as in `Reward`."""

    def setup(self) -> None:
        """Load weights. It is safe to call this twice. The base class has nothing to load."""

    @abstractmethod
    def detect(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """Return all candidates of each image, in any order; `GenEval` sorts them and applies its thresholds.

        Args:
            images: Pixels in [0, 1], float32.

        Returns:
            One list per image.
        """

    def colours(self, image: Float[Tensor, "3 h w"], detections: Sequence[Detection]) -> list[str]:
        """Return the colour name of each detection. Default: `Detection.colour`.

        Args:
            image: The image of the detections, pixels in [0, 1].
            detections: Detections of one class.

        Raises:
            ValueError: if a detection has no colour.
        """
        names = []
        for detection in detections:
            if detection.colour is None:
                raise ValueError(
                    f"{type(self).__name__}: a prompt specifies a colour, so each detection must have one. "
                    f"Found none on a {detection.label!r}. Set `Detection.colour` in `detect` or override `colours`."
                )
            names.append(detection.colour)
        return names
