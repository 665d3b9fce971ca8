"""GenEval as a reward: are the asked objects there, in the asked number, colour and place?"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward, identity_of
from rewards.geneval.detectors import Detector
from rewards.geneval.rules import COUNTING_THRESHOLD, MAX_OBJECTS, THRESHOLD, Verdict, check, evaluate
from rewards.texts import cut

SCORES = ("partial", "strict", "accuracy")


class GenEval(Reward):
    """Compositional correctness by object detection; the rules are in `rewards.geneval.rules`.

    Applies only to prompts whose metadata has `include`, a list of clauses. `reward_model` gives all three scores of each
    image in one pass, for reporting the accuracy of a policy trained on the partial score.

    Source: Ghosh, Hajishirzi, Schmidt, "GenEval", 2023, whose score is the mean of "accuracy" over its six tags.

    Args:
        detector: finds the objects and names their colours.
        score: "partial", at most 1 and negative where many surplus objects are found, for training; "strict", 0 or 1;
            "accuracy", 0 or 1 as published.
        threshold: confidence in [0, 1] above which a detection counts.
        counting_threshold: the same for prompts with the tag "counting".
        max_objects: most objects kept per class, >= 1.
        batch_size: images given to the detector at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if `score` is none of the three, or an argument is out of range.
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
                    f"GenEval: `{name}` must be at least the detector's `min_score`, {detector.min_score}, below which it "
                    f"returns nothing. Found {value}. Lower `detector.min_score`."
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
        """That of any reward, and its detector's."""
        found = identity_of(self.detector, self.detector.identity_fields)
        return super().identity | {f"detector {name}": value for name, value in found.items()}

    def setup(self) -> None:
        """Load the detector and freeze it."""
        self.detector.setup()
        self.detector.requires_grad_(False).eval()

    def applies_to(self, prompt: Prompt) -> bool:
        """Only prompts that say which objects to include."""
        return bool(prompt.metadata.get("include"))

    def tag(self, prompt: Prompt) -> str | None:
        """One of the benchmark's six tasks; its score is the mean over them of `score: accuracy`."""
        return prompt.metadata.get("tag")

    def check_prompt(self, prompt: Prompt) -> None:
        """Reject metadata the rules cannot judge, and classes the detector is known not to know."""
        check(prompt.metadata)
        self._check_names([prompt])

    @torch.no_grad()
    def reward_model(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Accuracy, strict and partial score of each image, from one pass of the detector.

        Args:
            images: float32 pixels in [0, 1].
            prompts: one per image; `supports` holds for each.

        Raises:
            ValueError: if the detector does not know a class a prompt names, or returns another number of lists than there
                are images, or metadata is malformed.
        """
        self._check_names(prompts)
        found = self.detector.detect(images)
        if len(found) != len(images):
            raise ValueError(
                f"GenEval: `{type(self.detector).__name__}.detect` must return one list an image. Found {len(found)} for "
                f"{len(images)} images. Return an empty list where nothing is seen."
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
            for image, prompt, detections in zip(images, prompts, found, strict=True)
        ]

    def _check_names(self, prompts: Sequence[Prompt]) -> None:
        """What prompts name must be among what the detector knows: a class or colour it never finds is never right."""
        clauses = [clause for prompt in prompts for key in ("include", "exclude") for clause in prompt.metadata.get(key, [])]
        for kind, key, known in (("class", "class", self.detector.classes), ("colour", "color", self.detector.colour_names)):
            asked = {clause[key] for clause in clauses if key in clause}
            if known is not None and (unknown := sorted(asked - known)):
                raise ValueError(
                    f"GenEval: `detector` must know every {kind} that prompts name. Found {cut(', '.join(unknown[:5]))}, "
                    f"which {type(self.detector).__name__} does not: it knows {', '.join(sorted(known))}. "
                    f"Name a detector that knows them, or leave these prompts out."
                )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """The chosen score of each image."""
        field = "correct" if self.kind == "accuracy" else self.kind
        verdicts = self.reward_model(images=images, prompts=prompts)
        return torch.tensor([float(getattr(verdict, field)) for verdict in verdicts], device=images.device)
