"""PickScore: a CLIP model trained on human choices between two images."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.clip.loading import VIT_H_PROCESSOR, check_dtype, load_tower
from rewards.clip.tower import CLIPTower


class PickScore(Reward):
    """Human preference: exp(logit_scale) * cos(text, image) / 26.

    Tables in papers report the undivided value, about 20 to 24. After division the reward is near 1. Set `divide_by` to 1
    to get the value of the tables.

    Args:
        path: Folder or hub id of the weights, a transformers-format CLIPModel.
        processor_path: Folder or hub id of tokenizer and preprocessor_config.json. The published weights were trained with
            the files of another repository. None: `path`.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of the weights: "float32", "bfloat16" or "float16". Scores are always float32.
        divide_by: Divisor of the score, > 0.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", 2023,
    section 4.
    """

    identity_fields = (*Reward.identity_fields, "divide_by")
    identity_defaults: ClassVar = {"processor_path": VIT_H_PROCESSOR}

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor_path: str | None = VIT_H_PROCESSOR,
        revision: str | None = None,
        dtype: str = "float32",
        divide_by: float = 26.0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size)
        if not divide_by > 0:
            raise ValueError(f"PickScore: `divide_by` must be > 0. Found {divide_by}. The published runs use 26.")
        self.path = path
        self.processor_path = processor_path
        self.revision = revision
        self.dtype = check_dtype("PickScore", dtype)
        self.divide_by = divide_by
        self.tower: CLIPTower | None = None

    def setup(self) -> None:
        """Load the tower."""
        if self.tower is None:
            self.tower = load_tower(
                "PickScore",
                path=self.path,
                processor_path=self.processor_path,
                revision=self.revision,
                dtype=self.dtype,
            )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """exp(logit_scale) * cos(text, image) / divide_by."""
        tower = self._require_loaded(self.tower)
        return tower.scale * tower.cosine(images=images, texts=[prompt.text for prompt in prompts]) / self.divide_by
