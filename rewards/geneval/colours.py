"""Classify the colours of detected objects by zero-shot CLIP."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.open_clip import clean_text
from rewards.clip.tower import CLIPTower
from rewards.geneval.detectors import Detection
from rewards.geneval.rules import COLOURS

TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
BACKGROUND = 0x99 / 255
"""Grey, #999999, which replaces all pixels outside the object."""


class ColourClassifier(nn.Module):
    """Classify an object's colour: the one of GenEval's ten colours with the highest CLIP similarity to the object.

    The object is cut out and placed on grey. A custom detector calls `classify` in its `colours`:

        def colours(self, image, detections):
            return self.classifier.classify(image, detections)

    The text embedding of a colour is the normalised mean of the embeddings of its three texts. The texts are cleaned as in
    open_clip.

    Args:
        path: Folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json. Rewards
            that use the same model in the same precision share it.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of the weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: if `dtype` is another value.

    Source: Ghosh, Hajishirzi, Schmidt, "GenEval", 2023, section 3.2, with CLIP ViT-L/14 and a grey background.
    """

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", revision: str | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.path, self.revision = path, revision
        self.dtype = check_dtype("ColourClassifier", dtype)
        self.tower: CLIPTower | None = None
        self._texts: dict[str, Tensor] = {}

    def setup(self) -> None:
        """Load the tower."""
        if self.tower is None:
            self.tower = load_tower(
                "ColourClassifier",
                path=self.path,
                revision=self.revision,
                dtype=self.dtype,
                centre="even",
                clean=clean_text,
            )

    @torch.no_grad()
    def classify(self, image: Float[Tensor, "3 h w"], detections: Sequence[Detection]) -> list[str]:
        """Return the name of each object's colour.

        Args:
            image: The image of the detections, pixels in [0, 1].
            detections: Detections of any class; the whole box is used for a detection without a mask.

        Raises:
            RuntimeError: if `setup` was not called.
            ValueError: if the size of a mask differs from the image's, or a box contains no pixel of the image.
        """
        if self.tower is None:
            raise RuntimeError(
                "ColourClassifier: weights must be loaded before classifying. Found none. Call `setup()` once."
            )
        names = []
        for detection in detections:
            feature = self.tower.embed_images(cut_out(image, detection)[None]).squeeze(0)  # crops differ in size: no batch
            texts = self._embed_texts(self.tower, detection.label).to(feature.device)
            names.append(COLOURS[int((texts @ feature).argmax())])
        return names

    def _embed_texts(self, tower: CLIPTower, label: str) -> Float[Tensor, "colour d"]:
        if label not in self._texts:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            embeddings = tower.embed_texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._texts[label] = F.normalize(embeddings.mean(dim=1), dim=-1)
        return self._texts[label]


def cut_out(image: Float[Tensor, "3 h w"], detection: Detection) -> Float[Tensor, "3 h2 w2"]:
    """Crop the image to the box of a detection, with grey outside its mask.

    Raises:
        ValueError: if the size of the mask differs from the image's, or the box contains no pixel of the image.
    """
    height, width = image.shape[-2:]
    if detection.mask is not None:
        mask = torch.as_tensor(detection.mask, dtype=torch.bool, device=image.device)
        if mask.shape != (height, width):
            raise ValueError(
                f"ColourClassifier: a mask must have the {height} x {width} pixels of its image. Found "
                f"{tuple(mask.shape)} on a {detection.label!r}. Resize masks to the image in `detect`."
            )
        image = torch.where(mask, image, BACKGROUND)
    x0, y0, x1, y1 = (round(value) for value in detection.box)
    crop = image[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if not crop.numel():
        raise ValueError(
            f"ColourClassifier: a box must hold at least one of the {height} x {width} pixels of its image. Found "
            f"{detection.box} on a {detection.label!r}. Give (x0, y0, x1, y1) in pixels in `detect`."
        )
    return crop
