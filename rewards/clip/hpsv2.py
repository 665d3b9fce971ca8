"""HPSv2: a CLIP model trained on human rankings of generated images."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.clip.loading import VIT_H_PROCESSOR, check_dtype, load_tower
from rewards.clip.open_clip import clean_text
from rewards.clip.tower import CLIPTower


class HPSv2(Reward):
    """Human preference: cos(text, image), without the logit scale, in [-1, 1].

    The longer side of the image is resized to the model's input size. Black bars fill the rest, so nothing is cropped. The
    text is cleaned as in open_clip, see `rewards.clip.open_clip.clean_text`.

    The default is version 2.1. The published file is read unchanged.

    Args:
        path: Folder or hub id of the weights.
        file: Name of a file in `path` with open_clip weights. An open_clip_config.json in the same folder describes the
            model; without one it is a ViT-H-14. None: `path` is a transformers-format CLIPModel.
        processor_path: Folder or hub id of tokenizer and preprocessor_config.json. None: `path`.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of the weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
    Synthesis", 2023, section 4.
    """

    identity_defaults: ClassVar = {"processor_path": VIT_H_PROCESSOR}

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        file: str | None = "HPS_v2.1_compressed.pt",
        processor_path: str | None = VIT_H_PROCESSOR,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size)
        self.path = path
        self.file = file
        self.processor_path = processor_path
        self.revision = revision
        self.dtype = check_dtype("HPSv2", dtype)
        self.tower: CLIPTower | None = None

    def setup(self) -> None:
        """Load the tower."""
        if self.tower is None:
            self.tower = load_tower(
                "HPSv2",
                path=self.path,
                file=self.file,
                processor_path=self.processor_path,
                revision=self.revision,
                dtype=self.dtype,
                fit="pad",
                clean=clean_text,
            )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """cos(text, image)."""
        return self._require_loaded(self.tower).cosine(images=images, texts=[prompt.text for prompt in prompts])
