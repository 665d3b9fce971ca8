"""ImageReward: a BLIP model trained on people's preferences between generated images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Prompt, Reward
from rewards.clip.heads import regression_head
from rewards.clip.loading import check_dtype
from rewards.files import below, find_file, load_weights
from rewards.imagereward.blip import BLIPTower, build_tower

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores over the training set, as published."""

TOKENS = 35
"""Length that captions are cut or filled up to."""


class ImageReward(Reward):
    """(MLP(BLIP(image, text)) - mean) / std over people's preferences, about -2 to 2.

    Every image is scored against its own prompt only, and each (image, prompt) pair takes one pass of the text tower.

    Source: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023.

    Args:
        path: folder or hub id of the weights.
        file: name of the file there.
        tokenizer_path: folder or hub id of a BERT tokenizer.
        revision: branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: number format of BLIP's weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer_path: str = "google-bert/bert-base-uncased",
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
        tower = build_tower("ImageReward", below("blip.", weights), tokenizer, getattr(torch, self.dtype), file)
        width = tower.text.config.hidden_size
        self.head = regression_head("ImageReward", width=width, weights=below("mlp.layers.", weights), source=file)
        self.tower = tower

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """The standardised output of the head."""
        texts = [prompt.text for prompt in prompts]
        features = self._loaded(self.tower).features(images=images, texts=texts, max_length=TOKENS)
        return (self._loaded(self.head)(features).squeeze(-1) - MEAN) / STD
