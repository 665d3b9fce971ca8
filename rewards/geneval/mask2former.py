"""The detector of the published GenEval: Mask2Former on COCO, and CLIP for colours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.checkpoints import check_finite
from rewards.clip.loading import check_dtype
from rewards.files import resolve_path, resolve_revision
from rewards.geneval.coco import COCO_CLASSES, coco_names
from rewards.geneval.colours import ColourClassifier
from rewards.geneval.detectors import Detection, Detector
from rewards.geneval.instances import DetectorPreprocess, find_instances
from rewards.geneval.rules import COLOURS, THRESHOLD
from rewards.hub import hub_reason

_models: WeakValueDictionary[tuple[str | None, ...], Any] = WeakValueDictionary()
"""Loaded models by path, revision and dtype, so that detectors with the same checkpoint share it."""


class Mask2Former(Detector):
    """Detect COCO's 80 classes by instance segmentation, and classify colours by zero-shot CLIP.

    Every class of every query is a candidate. Its score is the class probability times the mean probability of its mask,
    see `rewards.geneval.instances.find_instances`. Boxes are the bounding boxes of the masks.

    Args:
        path: Folder or hub id of a transformers-format Mask2FormerForUniversalSegmentation trained on COCO instances,
            with its preprocessor_config.json.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: Number format of the weights of both networks: "float32", "bfloat16" or "float16". Scores are float32.
        colour_path: Folder or hub id of the CLIPModel that classifies colours.
        colour_revision: Branch, tag or commit of `colour_path`. None: the pinned commit, see `rewards.files`.
        short_side: Pixels to which the shorter side of images is resized, >= 1. The benchmark uses 800, regardless of the
            checkpoint's preprocessor_config.json.
        long_side: Maximum pixels of the longer side, >= `short_side`.
        min_score: Candidates with a score <= `min_score` are left out, in [0, 1). It must not be above GenEval's
            `threshold`; otherwise candidates above `threshold` would be lost.

    Shape:
        - images: (B, 3, H, W)

    Raises:
        ValueError: if an argument is out of range.

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", 2022, as used by Ghosh,
    Hajishirzi, Schmidt, "GenEval", 2023.
    """

    classes = frozenset(COCO_CLASSES)
    colour_names = frozenset(COLOURS)
    identity_fields = (*Detector.identity_fields, "colour_path", "colour_revision", "short_side", "long_side")

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        revision: str | None = None,
        dtype: str = "float32",
        colour_path: str = "openai/clip-vit-large-patch14",
        colour_revision: str | None = None,
        short_side: int = 800,
        long_side: int = 1333,
        min_score: float = THRESHOLD,
    ) -> None:
        super().__init__()
        if not 0 <= min_score < 1:
            raise ValueError(f"Mask2Former: `min_score` must be in [0, 1). Found {min_score}. Scores lie there.")
        if not 1 <= short_side <= long_side:
            raise ValueError(
                f"Mask2Former: `short_side` must be >= 1 and at most `long_side`. Found {short_side} and {long_side}. "
                "The benchmark's are 800 and 1333."
            )
        self.path, self.revision = path, revision
        self.colour_path, self.colour_revision = colour_path, colour_revision
        self.dtype = check_dtype("Mask2Former", dtype)
        self.short_side, self.long_side, self.min_score = short_side, long_side, min_score
        self.classifier = ColourClassifier(colour_path, colour_revision, dtype)
        self.model: Any = None
        self.preprocess: DetectorPreprocess | None = None
        self.names: list[str] = []

    def setup(self) -> None:
        """Load both networks."""
        self.classifier.setup()
        if self.model is not None:
            return
        path = resolve_path(self.path)
        revision = resolve_revision(path, self.revision)
        config, processor_config = _describe(path, revision)
        self.names = coco_names("Mask2Former", config.get("id2label", {}), path)
        self.preprocess = DetectorPreprocess.from_config(processor_config, self.short_side, self.long_side)
        key = (path, revision, self.dtype)
        model = _models.get(key)
        if model is None:
            model = _models[key] = _load(path, revision, getattr(torch, self.dtype))
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def detect(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """Return all candidates of each image with a score above `min_score`.

        Raises:
            RuntimeError: if `setup` was not called.
        """
        if self.model is None or self.preprocess is None:
            raise RuntimeError(
                "Mask2Former: weights must be loaded before detecting. Found none. Call `setup()` once, then `to(device)`."
            )
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        output = self.model(pixel_values=pixels)
        height, width = images.shape[-2:]
        input_height, input_width = pixels.shape[-2:]
        return [
            find_instances(
                class_logits,
                mask_logits,
                self.names,
                input_size=(input_height, input_width),
                image_size=(height, width),
                min_score=self.min_score,
            )
            for class_logits, mask_logits in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def colours(self, image: Float[Tensor, "3 h w"], detections: Sequence[Detection]) -> list[str]:
        """Classify colours by CLIP, see `ColourClassifier`."""
        return self.classifier.classify(image, detections)


def _pin(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def _describe(path: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of config.json and preprocessor_config.json."""
    from transformers import PretrainedConfig
    from transformers.image_processing_base import ImageProcessingMixin

    with _explain_errors(path):
        config, _ = PretrainedConfig.get_config_dict(path, **_pin(revision))
        if not config:  # transformers returns an empty config if the folder has no config.json
            raise OSError("there is no config.json")
    if config.get("model_type") != "mask2former":
        raise ValueError(
            "Mask2Former: `path` must hold a Mask2FormerForUniversalSegmentation (model_type 'mask2former' in config.json). "
            f"Found {config.get('model_type')!r} in '{path}'. Point it to a transformers-format Mask2Former folder."
        )
    with _explain_errors(path):
        processor_config, _ = ImageProcessingMixin.get_image_processor_dict(path, **_pin(revision))
    return config, processor_config


def _load(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import Mask2FormerForUniversalSegmentation

    with _explain_errors(path):
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **_pin(revision)
        )
    # transformers would keep missing weights random. The buffer of the training loss is not needed for detection.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("criterion."))
    if missing:
        raise ValueError(
            f"Mask2Former: the checkpoint in '{path}' must hold every weight of its model. Found {len(missing)} missing, "
            f"such as {missing[0]}. Download it again."
        )
    check_finite("Mask2Former", model, path)
    return model


@contextmanager
def _explain_errors(path: str) -> Iterator[None]:
    """Replace a library's error by one that says what the folder must hold."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            "Mask2Former: `path` must be a folder or hub id of a transformers-format Mask2FormerForUniversalSegmentation "
            f"(config.json, weights and preprocessor_config.json). Found '{path}': {hub_reason(error, path)}."
        ) from error
