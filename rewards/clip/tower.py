"""CLIP towers of rewards: image preprocessing on tensors, embeddings and cosine similarities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.texts import truncate

BICUBIC = 3
"""PIL's number for bicubic resampling, as preprocessor_config.json spells it."""

Resize = Literal["bicubic", "bilinear"]
Centre = Literal["floor", "even"]
"""How half of the surplus pixels is rounded to get the start of a crop: "floor" rounds down, as in transformers; "even"
rounds half to even, as in torchvision. The two differ for a surplus of 3, 7, 11, ... pixels."""

LONGEST = 8
"""Largest ratio of the sides of an image that is resized as a whole before its centre is kept."""


@dataclass(frozen=True)
class Preprocess:
    """Resize with antialiasing, make square, normalise.

    A "crop" keeps only the centre. So an image that is longer than 8 times its short side first loses both ends, since
    resizing it whole could take hundreds of megabytes. The result may shift by about a pixel.

    Args:
        size: Target pixels of the resized side: the shorter one for "crop", the longer one for "pad".
        crop: Side of the square result in pixels; equal to `size` for "pad".
        mean: Mean per channel, subtracted from pixels in [0, 1].
        std: Standard deviation per channel, the divisor.
        fit: "crop" keeps the centre, as in CLIP's training; "pad" adds black bars, as in HPSv2's training.
        resize: "bicubic" or "bilinear".
        centre: How the start of a crop is rounded: "floor" or "even".

    Shape:
        - images: (B, 3, H, W), result: (B, 3, crop, crop)
    """

    size: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "pad"] = "crop"
    resize: Resize = "bicubic"
    centre: Centre = "floor"

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        if self.fit == "crop":
            images = cut_ends(images)
        height, width = images.shape[-2:]
        if self.fit == "crop":
            short = min(height, width)
            shape = (self.size * height // short, self.size * width // short)
        else:
            long = max(height, width)
            shape = (max(1, round(self.size * height / long)), max(1, round(self.size * width / long)))
        if shape != (height, width):
            # antialias=True makes torch's kernels equal PIL's. Bicubic resampling overshoots; PIL clips, and so does this.
            images = F.interpolate(images, size=shape, mode=self.resize, antialias=True).clamp(0, 1)
        spare_y, spare_x = self.crop - shape[0], self.crop - shape[1]
        if self.fit == "crop":
            top, left = (round(-spare / 2) if self.centre == "even" else -spare // 2 for spare in (spare_y, spare_x))
            images = images[..., top : top + self.crop, left : left + self.crop]
        else:  # black before normalising
            images = F.pad(images, (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2))
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    @classmethod
    def from_config(cls, config: Mapping[str, Any], fit: Literal["crop", "pad"] = "crop") -> "Preprocess":
        """Read a preprocessor_config.json; its sizes are numbers in old files and mappings in new ones.

        Raises:
            ValueError: if the file specifies another resampling, a fixed-aspect resize or a crop larger than the image.
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


def cut_ends(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
    """Cut the long side to `LONGEST` times the short one, or a pixel more so that both ends lose equally many.

    >>> import torch
    >>> cut_ends(torch.zeros(1, 3, 1, 512)).shape, cut_ends(torch.zeros(1, 3, 64, 512)).shape
    (torch.Size([1, 3, 1, 8]), torch.Size([1, 3, 64, 512]))
    """
    height, width = images.shape[-2:]
    longest = LONGEST * min(height, width)
    y, x = max(0, height - longest) // 2, max(0, width - longest) // 2
    return images[..., y : height - y, x : width - x]


class CLIPTower(nn.Module):
    """A frozen `CLIPModel` with its tokenizer and preprocessing. Built by `rewards.clip.loading.load_tower`.

    Args:
        model: The transformers `CLIPModel`, with exp(logit_scale) in float32 as a buffer `scale`.
        tokenizer: Tokenizer of the model.
        preprocess: Converts pixels to the model's input.
        clean: Function applied to each text before tokenization.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, clean: Callable[[str], str] = str) -> None:
        super().__init__()
        self.clean = clean
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @property
    def scale(self) -> Float[Tensor, ""]:
        """exp(logit_scale), CLIP's factor of the cosine, float32."""
        return self.model.scale

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return L2-normalised image embeddings, float32."""
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        # transformers 5 returns the whole model output here; the projected embedding is its pooler_output.
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Return L2-normalised text embeddings, float32; texts are truncated to the model's number of positions."""
        positions = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [self.clean(truncate(text, positions)) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=positions,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output.float(), dim=-1)

    def cosine(self, *, images: Float[Tensor, "b 3 h w"], texts: Sequence[str]) -> Float[Tensor, " b"]:
        """Return the cosine of each image with its own text; a text shared by several images is embedded once."""
        position = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        embedded = self.embed_texts(list(position))[[position[text] for text in texts]]
        return (self.embed_images(images) * embedded).sum(dim=-1)
