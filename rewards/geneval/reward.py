"""GenEval as a reward: whether an image shows the requested objects in the requested number, colour and position."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward, identity_of
from rewards.geneval.detectors import Detector
from rewards.geneval.rules import COUNTING_THRESHOLD, MAX_OBJECTS, THRESHOLD, Verdict, check, evaluate
from rewards.texts import shorten

SCORES = ("partial", "strict", "accuracy")


class GenEval(Reward):
    """Compositional correctness by object detection; the rules are in `rewards.geneval.rules`.

    It applies only to prompts with a list of clauses `include` in their metadata. `verdicts` returns all three scores of
    each image in one pass, for example to report the accuracy of a model trained on the partial score.

    Args:
        detector: Detects the objects and names their colours.
        score: "partial", at most 1, negative if many surplus objects are detected, for training; "strict", 0 or 1;
            "accuracy", 0 or 1, as published.
        threshold: Confidence in [0, 1] above which a detection counts.
        counting_threshold: The same for prompts with the tag "counting".
        max_objects: Maximum number of objects kept per class, >= 1.
        batch_size: Images passed to the detector at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if `score` is not one of the three, or an argument is out of range.

    Source: Ghosh, Hajishirzi, Schmidt, "GenEval", 2023. The published score is the mean of "accuracy" over the six tags.
    """

    identity_fields = (*Reward.identity_fields, "kind", "threshold", "counting_threshold", "max_objects")

    def __init__(
        self,
        detector: Detector,
        score: Literal["partial", "strict", "accuracy"] = "partial",
        threshold: float = THRESHOLD,
        counting_threshold: float = COUNTING_THRESHOLD,
        max_objects: int = MAX_OBJECTS,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size)
        if score not in SCORES:
            raise ValueError(f"GenEval: `score` must be one of {', '.join(SCORES)}. Found {score!r}. Choose one of them.")
        for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"GenEval: `{name}` must be in [0, 1]. Found {value}. Detector scores lie there.")
            if value < detector.min_score:
                raise ValueError(
                    f"GenEval: `{name}` must be at least the detector's `min_score`, {detector.min_score}: it returns no "
                    f"detections below that. Found {value}. Lower `detector.min_score`."
                )
        if max_objects < 1:
            raise ValueError(f"GenEval: `max_objects` must be >= 1. Found {max_objects}. The benchmark keeps 16.")
        self.detector = detector
        self.kind = score
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_objects = max_objects

    @property
    def identity(self) -> dict[str, str]:
        """The identity of the reward and of its detector."""
        detector = identity_of(self.detector, self.detector.identity_fields)
        return super().identity | {f"detector {name}": value for name, value in detector.items()}

    def setup(self) -> None:
        """Load the detector and freeze it."""
        self.detector.setup()
        self.detector.requires_grad_(False).eval()

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt lists objects to include."""
        return bool(prompt.metadata.get("include"))

    def tag(self, prompt: Prompt) -> str | None:
        """Return one of the benchmark's six tasks; the benchmark's score is the mean of `score: accuracy` over them."""
        return prompt.metadata.get("tag")

    def check_prompt(self, prompt: Prompt) -> None:
        """Reject metadata that the rules cannot evaluate, and classes or colours that the detector does not know."""
        check(prompt.metadata)
        self._check_names([prompt])

    @torch.no_grad()
    def verdicts(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Return accuracy, strict and partial score of each image, from one pass of the detector.

        Args:
            images: Pixels in [0, 1], float32.
            prompts: One prompt per image; `supports` is true for each.

        Raises:
            ValueError: if the detector does not know a class or colour of a prompt, it does not return one list per image,
                or metadata is malformed.
        """
        self._check_names(prompts)
        detections_per_image = self.detector.detect(images)
        if len(detections_per_image) != len(images):
            raise ValueError(
                f"GenEval: `{type(self.detector).__name__}.detect` must return one list per image. Found "
                f"{len(detections_per_image)} for {len(images)} images. Return an empty list if nothing is detected."
            )
        return [
            evaluate(
                prompt.metadata,
                detections,
                partial(self.detector.colours, image),
                threshold=self.threshold,
                counting_threshold=self.counting_threshold,
                max_objects=self.max_objects,
            )
            for image, prompt, detections in zip(images, prompts, detections_per_image, strict=True)
        ]

    def _check_names(self, prompts: Sequence[Prompt]) -> None:
        """Reject classes and colours that the detector does not know: such prompts could never be met."""
        clauses = [clause for prompt in prompts for key in ("include", "exclude") for clause in prompt.metadata.get(key, [])]
        for kind, key, known in (("class", "class", self.detector.classes), ("colour", "color", self.detector.colour_names)):
            requested = {clause[key] for clause in clauses if key in clause}
            if known is not None and (unknown := sorted(requested - known)):
                raise ValueError(
                    f"GenEval: `detector` must know every {kind} that prompts name. Found "
                    f"{shorten(', '.join(unknown[:5]))}, which {type(self.detector).__name__} does not: it knows "
                    f"{', '.join(sorted(known))}. "
                    f"Use a detector that knows them, or remove these prompts."
                )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the score of the chosen kind for each image."""
        field = "correct" if self.kind == "accuracy" else self.kind
        verdicts = self.verdicts(images=images, prompts=prompts)
        return torch.tensor([float(getattr(verdict, field)) for verdict in verdicts], device=images.device)
