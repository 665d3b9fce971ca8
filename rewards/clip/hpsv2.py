"""HPSv2: a CLIP model trained on people's rankings of generated images."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from rewards.base import Prompt, Reward
from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.open_clip import cleaned
from rewards.clip.tower import CLIPTower


class HPSv2(Reward):
    """Human preference: cos(text, image), without the logit scale, in [-1, 1].

    The image's longer side is resized to the model's size and the rest filled with black bars, so nothing is cropped. The
    text is cleaned as open_clip does, see `rewards.clip.open_clip.cleaned`.

    The default is version 2.1, whose published file is read as it is.

    Source: Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
    Synthesis", 2023, section 4.

    Args:
        path: folder or hub id of the weights.
        file: name of the file there, of an open_clip ViT-H-14, or of the model that an open_clip_config.json beside it
            describes. None: `path` is a transformers-format CLIPModel.
        processor_path: folder or hub id of tokenizer and preprocessor_config.json. None: `path`.
        revision: branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: number format of the weights: "float32", "bfloat16" or "float16". Scores are always float32.
        batch_size: images scored at once, >= 1.

    Shape:
        - images: (B, 3, H, W), result: (B,)

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        file: str | None = "HPS_v2.1_compressed.pt",
        processor_path: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
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
                clean=cleaned,
            )

    def score(self, *, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "b"]:
        """cos(text, image)."""
        return self._loaded(self.tower).cosine(images=images, texts=[prompt.text for prompt in prompts])
