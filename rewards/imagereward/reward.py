"""ImageReward: a BLIP model trained on human preferences between generated images."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Prompt, Reward
from rewards.clip.heads import regression_head
from rewards.clip.loading import check_dtype
from rewards.files import find_file, load_weights, select_prefix
from rewards.imagereward.blip import BLIPTower, build_tower

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Published mean and standard deviation of the raw scores over the training set."""

TOKENIZER = "google-bert/bert-base-uncased"
"""Hub id of the tokenizer that the published weights were trained with."""

TOKENS = 35
"""Number of tokens to which captions are truncated or padded."""


class ImageReward(Reward):
    """Human preference: (MLP(BLIP(image, text)) - mean) / std, about -2 to 2.

    Every image is scored against its own prompt only. Each (image, prompt) pair needs one forward pass of the text tower.

    Args:
        path: Folder or hub id of the weights.
        file: Name of the weight file in `path`.
        tokenizer_path: Folder or hub id of a BERT tokenizer.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of BLIP's weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023.
    """

    identity_defaults: ClassVar = {"tokenizer_path": TOKENIZER}

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer_path: str = TOKENIZER,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size)
        self.path, self.file, self.revision = path, file, revision
        self.tokenizer_path = tokenizer_path
        self.dtype = check_dtype("ImageReward", dtype)
        self.tower: BLIPTower | None = None
        self.head: nn.Sequential | None = None

    def setup(self) -> None:
        """Load tower, tokenizer and head."""
        if self.tower is not None:
            return
        from transformers import BertTokenizer

        file = find_file("ImageReward", path=self.path, name=self.file, revision=self.revision)
        vocabulary = find_file("ImageReward", path=self.tokenizer_path, name="vocab.txt")
        weights = load_weights("ImageReward", file)
        tokenizer = BertTokenizer(str(vocabulary))
        tower = build_tower("ImageReward", select_prefix("blip.", weights), tokenizer, getattr(torch, self.dtype), file)
        width = tower.text.config.hidden_size
        self.head = regression_head("ImageReward", width=width, weights=select_prefix("mlp.layers.", weights), source=file)
        self.tower = tower

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the standardised output of the head."""
        texts = [prompt.text for prompt in prompts]
        features = self._require_loaded(self.tower).features(images=images, texts=texts, max_length=TOKENS)
        return (self._require_loaded(self.head)(features).squeeze(-1) - MEAN) / STD
