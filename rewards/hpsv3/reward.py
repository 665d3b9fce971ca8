"""HPSv3: a vision-language model trained on human preferences between generated and real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.clip.heads import preference_head
from rewards.clip.loading import check_dtype
from rewards.files import find_file, load_weights, select_prefix
from rewards.hpsv3.qwen import ChatTokenizer, QwenScorer, build_model

BASE = "Qwen/Qwen2-VL-7B-Instruct"
"""Hub id of the model that the published weights were trained from."""

PIXELS = 256 * 28 * 28
"""Published area of the resized image: 256 image tokens, 448 x 448 pixels for a square."""


class HPSv3(Reward):
    """Human preference: the mean of the score's predicted normal distribution, which has no fixed range.

    Qwen2-VL reads the image and the published question about it. A head maps the hidden state of the token after the
    question to mean and standard deviation; the reward is the mean. Images are rounded to 8 bits and resized (bicubic) to
    `pixels`, with sides that are multiples of 28 and nearly the same aspect ratio. Captions are not truncated.

    The published model has 8 billion parameters, 17 GB in bfloat16.

    Args:
        path: Folder or hub id of the weights.
        file: Name of the weight file in `path`.
        base_path: Folder or hub id of config.json and tokenizer.json of the model that `file` was trained from. Its weights
            are not needed.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of Qwen2-VL's weights: "float32", "bfloat16" or "float16". The head is always float32.
        pixels: Area in pixels of the resized image, >= 784. The published model was trained with 200704.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Ma et al., "HPSv3: Towards Wide-Spectrum Human Preference Score", 2025, section 4.
    """

    identity_fields = (*Reward.identity_fields, "pixels")
    identity_defaults: ClassVar = {"base_path": BASE}

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        base_path: str = BASE,
        revision: str | None = None,
        dtype: str = "bfloat16",
        pixels: int = PIXELS,
        batch_size: int = 16,
    ) -> None:
        super().__init__(batch_size)
        if pixels < 28 * 28:
            raise ValueError(f"HPSv3: `pixels` must be >= 784, one image token. Found {pixels}. Published: {PIXELS}.")
        self.path, self.file, self.base_path, self.revision = path, file, base_path, revision
        self.dtype, self.pixels = check_dtype("HPSv3", dtype), pixels
        self.scorer: QwenScorer | None = None

    def setup(self) -> None:
        """Load model, tokenizer and head."""
        if self.scorer is not None:
            return
        config = find_file("HPSv3", path=self.base_path, name="config.json")
        tokenizer_file = find_file("HPSv3", path=self.base_path, name="tokenizer.json")
        file = find_file("HPSv3", path=self.path, name=self.file, revision=self.revision)
        weights = load_weights("HPSv3", file)
        model, vocabulary = build_model("HPSv3", weights, config, getattr(torch, self.dtype), file)
        tokenizer = ChatTokenizer("HPSv3", tokenizer_file, model.config.image_token_id, vocabulary)
        width = model.config.text_config.hidden_size
        head = preference_head("HPSv3", width=width, weights=select_prefix("rm_head.", weights), source=file)
        self.scorer = QwenScorer(model, head, tokenizer, self.pixels)

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the predicted mean."""
        scorer, texts = self._require_loaded(self.scorer), [prompt.text for prompt in prompts]
        return scorer((images * 255).round().byte(), texts)[:, 0]
