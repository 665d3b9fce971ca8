"""UnifiedReward 1 and 2: questions and answer formats for `VisionLanguageReward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.base import Reward
from rewards.remote.vlm import VisionLanguageReward

QUESTION = """This image was generated from a text caption. Rate it by two criteria:
1. Alignment with the caption: does it show the objects, attributes, counts and relations that the caption describes?
2. Overall quality: is it clear, rich in detail, right in its colours and pleasing to look at?
Weigh both and give one score from 1 (worst) to 5 (best). End your answer with "Final Score: X", where X is that score.
Text caption: {caption}"""
"""This project's own question, not the published one of UnifiedReward 1."""

FINAL_SCORE = r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)"

QUESTION_2 = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image across "
    "multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
"""The question that the models of version 2 were trained with, verbatim."""

AXES = ("alignment", "coherence", "style")
"""Ratings in an answer of version 2, in its order."""


class UnifiedReward(VisionLanguageReward):
    """Alignment and quality rated by a vision-language model: the number after "Final Score:" / 5, 0.2 to 1.

    The default question is this project's own. It asks for the same two criteria as the published one, in other words, so
    scores are not comparable with published ones. For those, give the published text as `question`.

    An answer without a rating is a missing score. The model runs on a separate server that handles many requests at once:

        vllm serve CodeGoat24/UnifiedReward-7b-v1.5 --port 17140

    Args:
        base_url: URL of the server's OpenAI-compatible interface, including /v1; or a list of several.
        model: Name of the model on the server.
        api_key: The server's key. None: the environment variable OPENAI_API_KEY, or no key if that is not set. Prefer the
            variable: a run's config.yaml contains a key given here, but checkpoints and exported files do not.
        question: Question about the image. {caption} stands where the prompt belongs, and no other name is in braces. It
            must ask for an answer with "Final Score: X", X from 1 to 5. None: this project's own question.
        size: Side in pixels of the square to which the image is resized, >= 1.
        max_tokens: Maximum number of tokens of an answer, >= 1. An answer cut before its rating is a missing score.
        concurrency: Maximum number of simultaneous requests of each training process, >= 1.
        timeout: Seconds for one attempt, from connecting to the last byte of the answer, > 0.
        retries: Number of further attempts, >= 0, see `VisionLanguageReward`.
        batch_size: Images divided among `concurrency` requests at once, >= 1.
        deadline: Seconds for a request with all its attempts and pauses, > 0.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025; answer format and scale
    as in Flow-GRPO, the default question not.
    """

    # Earlier results name exactly these; the answer format is constant.
    identity_fields = (*Reward.identity_fields, "model", "question", "size", "max_tokens")
    placeholder = "caption"

    def __init__(
        self,
        base_url: str | list[str] = "http://localhost:17140/v1",
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        api_key: str | None = None,
        question: str | None = None,
        size: int = 512,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        batch_size: int = 128,
        deadline: float = 300.0,
    ) -> None:
        super().__init__(
            question=QUESTION if question is None else question,
            pattern=FINAL_SCORE,
            lowest=1,
            highest=5,
            divide_by=5,
            base_url=base_url,
            model=model,
            api_key=api_key,
            size=size,
            max_tokens=max_tokens,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            batch_size=batch_size,
            deadline=deadline,
        )


class UnifiedReward2(VisionLanguageReward):
    """Alignment, coherence and style rated by a vision-language model: the mean of the chosen ratings / 5, 0.2 to 1.

    An answer without one of the chosen ratings is a missing score. The model runs on a separate server:

        vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b

    Args:
        base_url: URL of the server's OpenAI-compatible interface, including /v1; or a list of several.
        model: Name of the model on the server, one of the family CodeGoat24/UnifiedReward-2.0.
        axes: Ratings whose mean is the score, one or more of "alignment", "coherence" and "style". None: all three.
        **kwargs: Options of the requests, see `VisionLanguageReward`.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range, or `axes` is empty or names another rating.

    Source: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025; question and answer format
    of the published models of version 2.0.
    """

    def __init__(
        self,
        base_url: str | list[str] = "http://localhost:8000/v1",
        model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        axes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            question=QUESTION_2,
            pattern=axes_pattern(self._name, AXES if axes is None else axes),
            lowest=1,
            highest=5,
            divide_by=5,
            base_url=base_url,
            model=model,
            **kwargs,
        )


def axes_pattern(owner: str, axes: Sequence[str]) -> str:
    """Return the pattern of the ratings `axes` in an answer of version 2.

    Raises:
        ValueError: if `axes` is empty or names another rating.
    """
    if isinstance(axes, str) or not axes or not set(axes) <= set(AXES):
        raise ValueError(f"{owner}: `axes` must name one or more of {', '.join(AXES)}. Found {axes!r}. Correct the list.")
    ratings = [rf"{axis.capitalize()} Score \(1-5\):\s*(\d+(?:\.\d+)?)" for axis in AXES if axis in axes]
    return r"[\s\S]*?".join(ratings)
