"""Names the colours of objects that a detector found, by zero-shot CLIP."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.clip.loading import check_dtype, load_tower
from rewards.clip.open_clip import cleaned
from rewards.clip.tower import CLIPTower
from rewards.geneval.detectors import Detection
from rewards.geneval.rules import COLOURS

TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
BACKGROUND = 0x99 / 255
"""Grey, #999999, in place of everything that is not the object."""


class ColourClassifier(nn.Module):
    """The one of GenEval's ten colours whose texts CLIP finds nearest to the object, cut out and put on grey.

    A detector of your own calls `classify` in its `colours`:

        def colours(self, image, detections):
            return self.classifier.classify(image, detections)

    A colour's text embedding is the normalised mean of those of its three texts, cleaned as open_clip does.

    Source: Ghosh, Hajishirzi, Schmidt, "GenEval", 2023, section 3.2, with CLIP ViT-L/14 and a grey background.

    Args:
        path: folder or hub id of a transformers-format CLIPModel with its tokenizer and preprocessor_config.json. A
            reward that has loaded the same one in the same precision shares it.
        revision: branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: number format of the weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: if `dtype` is none of these.
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
                clean=cleaned,
            )

    @torch.no_grad()
    def classify(self, image: Float[Tensor, "3 h w"], detections: Sequence[Detection]) -> list[str]:
        """Name of each object's colour.

        Args:
            image: the image the detections were made on, pixels in [0, 1].
            detections: of any class; without a mask, the whole box is looked at.

        Raises:
            RuntimeError: if `setup` was not called.
            ValueError: if a mask has another size than the image, or a box holds none of its pixels.
        """
        if self.tower is None:
            raise RuntimeError(
                "ColourClassifier: weights must be loaded before colours are named. Found none. Call `setup()` once."
            )
        names = []
        for detection in detections:
            feature = self.tower.embed_images(cut_out(image, detection)[None]).squeeze(0)  # each has a size of its own
            texts = self._embedded(self.tower, detection.label).to(feature.device)
            names.append(COLOURS[int((texts @ feature).argmax())])
        return names

    def _embedded(self, tower: CLIPTower, label: str) -> Float[Tensor, "colour d"]:
        if label not in self._texts:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            each = tower.embed_texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._texts[label] = F.normalize(each.mean(dim=1), dim=-1)
        return self._texts[label]


def cut_out(image: Float[Tensor, "3 h w"], detection: Detection) -> Float[Tensor, "3 h2 w2"]:
    """The box of a detection, grey outside its mask.

    Raises:
        ValueError: if the mask has another size than the image, or the box holds none of its pixels.
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
