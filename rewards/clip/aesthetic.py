"""Aesthetic: predicted human rating of an image's beauty, independent of its caption."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Prompt, Reward
from rewards.clip.heads import linear_head, regression_head
from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.tower import CLIPTower
from rewards.files import find_file, load_weights, select_prefix


class Aesthetic(Reward):
    """LAION's aesthetic predictor: a head on the L2-normalised CLIP image embedding; raw, about 1 to 10.

    The head is the published MLP, or a single linear layer, the form of LAION's first predictor. The file decides.

    Args:
        path: Folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json.
        head_path: Folder or hub id of the head's weights.
        head_file: Name of the file in `head_path`, safetensors or PyTorch: the five layers of the MLP, `layers.0.weight`
            to `layers.7.bias`, or the `weight` (1, embedding) and `bias` (1,) of one linear layer.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        head_revision: Branch, tag or commit of `head_path`. None: its main branch, since no commit of it is pinned.
        dtype: Number format of the CLIP weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: Images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.

    Source: Schuhmann, "CLIP+MLP Aesthetic Score Predictor", 2022, weights `sac+logos+ava1-l14-linearMSE`; for the linear
    head Schuhmann and Beaumont, "LAION-Aesthetics_Predictor V1", 2022, weights `sa_0_4_vit_l_14_linear`.
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
        self.head: nn.Module | None = None

    def setup(self) -> None:
        """Load the tower and the head."""
        if self.tower is None:
            file = find_file("Aesthetic", path=self.head_path, name=self.head_file, revision=self.head_revision)
            tower = load_tower("Aesthetic", path=self.path, revision=self.revision, dtype=self.dtype)
            weights = load_weights("Aesthetic", file)
            self.head = build_head(weights, tower.model.config.projection_dim, file)
            self.tower = tower

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, " b"]:
        """Return the output of the head; captions are ignored."""
        return self._require_loaded(self.head)(self._require_loaded(self.tower).embed_images(images)).squeeze(-1)


def build_head(weights: Mapping[str, Tensor], width: int, source: object) -> nn.Module:
    """Build the head that a file holds: one linear layer, or the published MLP.

    Args:
        weights: Content of the file.
        width: Dimension of the CLIP embedding.
        source: The file, for error messages.

    Raises:
        ValueError: if the weights are neither, or do not fit the embedding.
    """
    if set(weights) == {"weight", "bias"}:
        return linear_head("Aesthetic", width=width, weights=weights, source=source)
    if layers := select_prefix("layers.", weights):
        return regression_head("Aesthetic", width=width, weights=layers, source=source)
    raise ValueError(
        f"Aesthetic: {source} must hold the layers of the published MLP, `layers.0.weight` to `layers.7.bias`, or the "
        f"`weight` and `bias` of one linear layer. Found {', '.join(sorted(weights)[:4]) or 'nothing'}. Use LAION's files."
    )
