"""The seam between `GenEval` and whatever finds objects in images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from rewards.deprecated import Renamed, adopt_old_names


@dataclass(frozen=True)
class Detection:
    """One object a detector believes it sees.

    Args:
        label: class name, spelled as in the prompts' metadata.
        score: confidence in [0, 1].
        box: corners (x0, y0, x1, y1) in pixels, x to the right and y downwards.
        mask: boolean array or tensor of shape (H, W), True on the object, or None.
        colour: name of the object's colour where the detector knows it, or None.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None
    colour: str | None = None


class Detector(nn.Module, ABC):
    """Finds objects and names their colours. Subclass it, override `detect`, and hand it to `GenEval`."""

    classes: frozenset[str] | None = None
    """Names of the classes it can find; None where that cannot be told beforehand."""
    colour_names: frozenset[str] | None = None
    """Names of the colours it can see; None where that cannot be told beforehand."""
    min_score: float = 0.0
    """Candidates that score no more are not returned."""
    identity_fields: tuple[str, ...] = ("path", "revision", "dtype", "min_score")
    """Attributes that what it finds depends on, as of a reward."""
    scored_by = Renamed("identity_fields")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        adopt_old_names(cls)

    def setup(self) -> None:
        """Load weights. Safe to call twice; the base has nothing to load."""

    @abstractmethod
    def detect(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """All candidates of each image, in any order and unthresholded: `GenEval` sorts and drops them by its rules.

        Args:
            images: float32 pixels in [0, 1].

        Returns:
            One list per image.
        """

    def colours(self, image: Float[Tensor, "3 h w"], detections: Sequence[Detection]) -> list[str]:
        """Colour name of each detection. Default: the colour it carries.

        Args:
            image: the image the detections were made on, pixels in [0, 1].
            detections: objects of one class.

        Raises:
            ValueError: if a detection carries no colour.
        """
        names = []
        for detection in detections:
            if detection.colour is None:
                raise ValueError(
                    f"{type(self).__name__}: a prompt asks for a colour, so each detection must carry one. "
                    f"Found none on a {detection.label!r}. Set `Detection.colour` in `detect` or override `colours`."
                )
            names.append(detection.colour)
        return names
