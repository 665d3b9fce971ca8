"""Aesthetic: how good-looking people would find an image, whatever its caption."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Prompt, Reward
from rewards.clip import CLIPTower
from rewards.clip_loading import check_dtype, load_tower
from rewards.files import find_file, load_weights

WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of the head's layers. There is no activation between them."""


class Aesthetic(Reward):
    """LAION's aesthetic predictor: an MLP on the L2-normalised CLIP image embedding; raw, about 1 to 10.

    Source: Schuhmann, "CLIP+MLP Aesthetic Score Predictor", 2022, weights `sac+logos+ava1-l14-linearMSE`.

    Args:
        path: folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json.
        head_path: folder or hub id of the MLP's weights.
        head_file: name of the file there, safetensors or PyTorch.
        revision: branch, tag or commit of `path`. None: its main branch.
        head_revision: branch, tag or commit of `head_path`. None: its main branch.
        dtype: number format of the CLIP weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

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
            weights = load_weights("Aesthetic", file)
            head = mlp(tower.model.config.projection_dim)
            try:
                head.load_state_dict({name.removeprefix("layers."): tensor.float() for name, tensor in weights.items()})
            except RuntimeError as error:
                raise ValueError(
                    f"Aesthetic: {file} must hold the five linear layers of an aesthetic head, the first one as wide as the "
                    f"{tower.model.config.projection_dim} numbers that '{self.path}' makes of an image. Found another: "
                    f"{str(error).splitlines()[-1].strip()} Use the head that was trained on this CLIP model."
                ) from error
            self.tower, self.head = tower, head.requires_grad_(False).eval()

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """The head's output; the captions are not looked at."""
        embedded = self._loaded(self.tower).embed_images(images)
        return self._loaded(self.head)(F.normalize(embedded, dim=-1)).squeeze(-1)


def mlp(width: int) -> nn.Sequential:
    """The head on embeddings of that width, numbered as in the published file, which counts its dropout layers."""
    widths = (width, *WIDTHS)
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip(widths, WIDTHS, strict=False)):
        layers.append(nn.Linear(inputs, outputs))
        if number < 3:
            layers.append(nn.Dropout((0.2, 0.2, 0.1)[number]))
    return nn.Sequential(*layers)
