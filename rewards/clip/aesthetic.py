"""Aesthetic: predicted human rating of an image's beauty, independent of its caption."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Prompt, Reward
from rewards.clip.heads import regression_head
from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.tower import CLIPTower
from rewards.files import find_file, load_weights, select_prefix


class Aesthetic(Reward):
    """LAION's aesthetic predictor: an MLP on the L2-normalised CLIP image embedding; raw, about 1 to 10.

    Args:
        path: Folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json.
        head_path: Folder or hub id of the MLP's weights.
        head_file: Name of the file in `head_path`, safetensors or PyTorch.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        head_revision: Branch, tag or commit of `head_path`. None: its main branch.
        dtype: Number format of the CLIP weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Schuhmann, "CLIP+MLP Aesthetic Score Predictor", 2022, weights `sac+logos+ava1-l14-linearMSE`.
    """

    identity_fields = (*Reward.identity_fields, "head_path", "head_file", "head_revision")

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        head_path: str = "trl-lib/ddpo-aesthetic-predictor",
        head_file: str = "aesthetic-model.pth",
        revision: str | None = None,
        head_revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size)
        self.path, self.revision = path, revision
        self.head_path, self.head_file, self.head_revision = head_path, head_file, head_revision
        self.dtype = check_dtype("Aesthetic", dtype)
        self.tower: CLIPTower | None = None
        self.head: nn.Sequential | None = None

    def setup(self) -> None:
        """Load the tower and the head."""
        if self.tower is None:
            file = find_file("Aesthetic", path=self.head_path, name=self.head_file, revision=self.head_revision)
            tower = load_tower("Aesthetic", path=self.path, revision=self.revision, dtype=self.dtype)
            weights = select_prefix("layers.", load_weights("Aesthetic", file))
            self.head = regression_head("Aesthetic", width=tower.model.config.projection_dim, weights=weights, source=file)
            self.tower = tower

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the output of the head; captions are ignored."""
        return self._require_loaded(self.head)(self._require_loaded(self.tower).embed_images(images)).squeeze(-1)
