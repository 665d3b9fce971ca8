"""CLIPScore: how well an image matches its caption, according to CLIP."""

from collections.abc import Sequence
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.tower import CLIPTower, Resize


class CLIPScore(Reward):
    """Text alignment: logits_per_image / 100 = exp(logit_scale) * cos(text, image) / 100.

    The logit scale of the published models is 100, so their score equals the cosine. It can be negative. Unlike the metric
    of the paper, it is neither clamped at 0 nor multiplied by 2.5.

    Args:
        path: Folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of the weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: Images scored at once, >= 1.
        resize: "bilinear" as in the published runs of DiffusionNFT and MARBLE, "bicubic" as in CLIP's training. Images of
            the model's input size are not resized.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; as a score,
    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021, section 3.
    """

    identity_fields = (*Reward.identity_fields, "resize")

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        resize: Resize = "bilinear",
    ) -> None:
        super().__init__(batch_size)
        if resize not in get_args(Resize):
            raise ValueError(f"CLIPScore: `resize` must be 'bilinear' or 'bicubic'. Found {resize!r}. Choose one of them.")
        self.resize: Resize = resize
        self.path = path
        self.revision = revision
        self.dtype = check_dtype("CLIPScore", dtype)
        self.tower: CLIPTower | None = None

    def setup(self) -> None:
        """Load the tower."""
        if self.tower is None:
            self.tower = load_tower(
                "CLIPScore",
                path=self.path,
                revision=self.revision,
                dtype=self.dtype,
                resize=self.resize,
                centre="even",
            )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """exp(logit_scale) * cos(text, image) / 100."""
        tower = self._require_loaded(self.tower)
        return tower.scale * tower.cosine(images=images, texts=[prompt.text for prompt in prompts]) / 100
