"""CLIP towers as rewards use them: loading in transformers format, image preprocessing on tensors, embeddings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BICUBIC = 3
"""PIL's number for bicubic resampling, as preprocessor_config.json spells it."""


@dataclass(frozen=True)
class Preprocess:
    """Resize bicubically, make square, normalise.

    Args:
        size: pixels of the side that is resized, the shorter one for "crop", the longer one for "pad".
        crop: pixels of the square result; equal to `size` for "pad".
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divided by.
        fit: "crop" keeps the centre, as CLIP was trained; "pad" shows all of it between black bars, as HPSv2 was.

    Shape:
        - images: (B, 3, H, W), result: (B, 3, crop, crop)
    """

    size: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "pad"] = "crop"

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        height, width = images.shape[-2:]
        if self.fit == "crop":
            short = min(height, width)
            shape = (self.size * height // short, self.size * width // short)
        else:
            long = max(height, width)
            shape = (max(1, round(self.size * height / long)), max(1, round(self.size * width / long)))
        if shape != (height, width):
            # antialias=True also makes torch's bicubic kernel the one of PIL. It overshoots, PIL clips: so do we.
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
        spare_y, spare_x = self.crop - shape[0], self.crop - shape[1]
        if self.fit == "crop":
            top, left = -spare_y // 2, -spare_x // 2
            images = images[..., top : top + self.crop, left : left + self.crop]
        else:  # black before normalising
            images = F.pad(images, (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2))
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    @classmethod
    def from_config(cls, config: Mapping[str, Any], fit: Literal["crop", "pad"] = "crop") -> "Preprocess":
        """Read the numbers of a preprocessor_config.json, whose sizes are numbers in old files and mappings in new ones.

        Raises:
            ValueError: if the file asks for another resampling, a fixed-aspect resize or a crop larger than the image.
        """
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        size = size.get("shortest_edge") if isinstance(size, Mapping) else size
        sides = {crop["height"], crop["width"]} if isinstance(crop, Mapping) else {crop}
        if size is None or len(sides) != 1 or max(sides) > size or config.get("resample", BICUBIC) != BICUBIC:
            raise ValueError(
                "preprocessor_config.json must resize the shortest edge bicubically (`resample` 3) and crop a square "
                f"no larger. Found size {config.get('size')}, crop_size {crop}, resample {config.get('resample')}. "
                "Use the file of a CLIP model."
            )
        side = sides.pop()
        return cls(side if fit == "pad" else size, side, tuple(config["image_mean"]), tuple(config["image_std"]), fit)


class CLIPTower(nn.Module):
    """A frozen `CLIPModel` with its tokenizer and preprocessing. Built by `load_tower`.

    Args:
        model: transformers `CLIPModel`.
        tokenizer: its tokenizer.
        preprocess: what turns pixels into its input.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @property
    def scale(self) -> Float[Tensor, ""]:
        """exp(logit_scale), what CLIP multiplies cosines with."""
        return self.model.logit_scale.float().exp()

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """L2-normalised image embeddings, float32."""
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        # transformers 5 returns the whole model output here; the projected embedding is its pooler_output.
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """L2-normalised text embeddings, float32; texts are cut to the positions the model has."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output.float(), dim=-1)

    def cosine(self, *, images: Float[Tensor, "b 3 h w"], texts: Sequence[str]) -> Float[Tensor, "b"]:
        """Cosine of each image with its own text. A text shared by several images is embedded once."""
        position = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        embedded = self.embed_texts(list(position))[[position[text] for text in texts]]
        return (self.embed_images(images) * embedded).sum(dim=-1)


def load_tower(
    owner: str,
    *,
    path: str,
    processor_path: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    fit: Literal["crop", "pad"] = "crop",
) -> CLIPTower:
    """Load a CLIP model, its tokenizer and its preprocessing from a local folder or a hub id.

    Args:
        owner: name of the reward, for error messages.
        path: folder or hub id of a transformers-format `CLIPModel`.
        processor_path: folder or hub id of tokenizer and preprocessor_config.json. None: `path`.
        revision: branch, tag or commit of `path`. None: its main branch.
        dtype: "float32", "bfloat16" or "float16".
        fit: how images become square, see `Preprocess`.

    Raises:
        FileNotFoundError: if a file is missing or the hub cannot be reached.
        ValueError: if the folder holds another model, lacks weights, or its files do not fit together.
    """
    from transformers import CLIPModel, CLIPTokenizer, PretrainedConfig
    from transformers.image_processing_base import ImageProcessingMixin

    source = processor_path or path
    pin: dict[str, Any] = {} if revision is None else {"revision": revision}
    # A revision names a commit of one repository, so it must not be looked up in another.
    source_pin = pin if source == path else {}
    with _explained(owner, path, source):
        config, _ = PretrainedConfig.get_config_dict(path, **pin)
        if not config:  # what transformers returns where a folder has no config.json
            raise OSError("there is no config.json")
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{owner}: `path` must hold a CLIPModel (model_type 'clip' in config.json). Found "
            f"{config.get('model_type')!r} in '{path}'. Point it to a transformers-format CLIPModel folder."
        )
    with _explained(owner, path, source):
        numbers, _ = ImageProcessingMixin.get_image_processor_dict(source, **source_pin)
        tokenizer = CLIPTokenizer.from_pretrained(source, **source_pin)
        loaded: Any = CLIPModel.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True, **pin)
        model, report = loaded
    if report["missing_keys"]:  # transformers would leave them random, and a random judge gives scores all the same
        raise ValueError(
            f"{owner}: the checkpoint in '{path}' must hold every weight of its CLIPModel. Found "
            f"{len(report['missing_keys'])} missing, such as {min(report['missing_keys'])}. Download it again."
        )
    vocabulary, image_size = model.config.text_config.vocab_size, model.config.vision_config.image_size
    if len(tokenizer) != vocabulary:  # transformers builds an all but empty tokenizer where the files are missing
        raise ValueError(
            f"{owner}: the tokenizer in '{source}' must have the {vocabulary} tokens of the model in '{path}'. "
            f"Found {len(tokenizer)}. Put vocab.json and merges.txt, or tokenizer.json, of that model there."
        )
    preprocess = Preprocess.from_config(numbers, fit)
    if preprocess.crop != image_size:
        raise ValueError(
            f"{owner}: preprocessor_config.json in '{source}' must crop to the {image_size} pixels of the model in "
            f"'{path}'. Found {preprocess.crop}. Use the preprocessor of that model."
        )
    return CLIPTower(model, tokenizer, preprocess)


@contextmanager
def _explained(owner: str, path: str, source: str) -> Iterator[None]:
    """Say what a folder must hold instead of what the library tripped over."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{owner}: `path` must be a folder or hub id of a transformers-format CLIPModel (config.json and weights), "
            "and the processor's one (`processor_path` if given, else `path`) must hold tokenizer files and "
            f"preprocessor_config.json. Found '{path}' and '{source}': {reason}. Check the spelling, or download the "
            "repository where there is a network and give its folder."
        ) from error


def check_dtype(owner: str, dtype: str) -> str:
    """`dtype`, if a CLIP tower can be loaded in it.

    Raises:
        ValueError: if it is not "float32", "bfloat16" or "float16".
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{owner}: `dtype` must be float32, bfloat16 or float16. Found {dtype!r}. Choose one of them.")
    return dtype
