"""Convert BLIP checkpoints to transformers models; network sizes are inferred from the weights."""

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.checkpoints import check_finite
from rewards.clip.tower import Preprocess
from rewards.files import select_prefix
from rewards.texts import truncate

HEAD = 64
"""Width of an attention head, in both towers."""

NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
"""(pattern, replacement) pairs for the image tower's weight names, applied in this order. Text tower names are unchanged."""


class BLIPTower(nn.Module):
    """A frozen image tower and a frozen text tower with cross-attention to the image patches.

    Args:
        vision: The transformers `BlipVisionModel`.
        text: The transformers `BlipTextModel` with cross-attention.
        tokenizer: Tokenizer of the text tower.
        preprocess: Converts pixels to the image tower's input.
    """

    def __init__(self, vision: Any, text: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision = vision.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval()
        self.tokenizer, self.preprocess = tokenizer, preprocess

    def features(
        self, *, images: Float[Tensor, "b 3 h w"], texts: Sequence[str], max_length: int
    ) -> Float[Tensor, "b width"]:
        """Return the text tower's output at the first token for each (image, text) pair, float32."""
        pixels = self.preprocess(images.to(self.vision.device)).to(self.vision.dtype)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            [truncate(text, max_length) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(patches.device)
        output = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        )
        return output.last_hidden_state[:, 0].float()


def build_tower(owner: str, weights: Mapping[str, Tensor], tokenizer: Any, dtype: torch.dtype, source: object) -> BLIPTower:
    """Build the two towers from the weights `visual_encoder.*` and `text_encoder.*`.

    Args:
        owner: Name of the reward, for error messages.
        weights: Weights by BLIP's names; other names are ignored.
        tokenizer: Tokenizer of the text tower.
        dtype: Number format of the weights.
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: if weights are missing or do not fit together, or the tokenizer has more tokens than the model.
    """
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = {_new_name(name): tensor for name, tensor in select_prefix("visual_encoder.", weights).items()}
    text = {
        name: tensor for name, tensor in select_prefix("text_encoder.", weights).items() if not name.endswith("position_ids")
    }
    try:
        vision_config, text_config = _vision_config(vision), _text_config(text)
        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
        vision_model, vision_report = BlipVisionModel.from_pretrained(
            None, config=vision_config, state_dict=vision, **options
        )
        text_model, text_report = BlipTextModel.from_pretrained(
            None, config=text_config, state_dict=text, add_pooling_layer=False, **options
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{owner}: {source} must hold BLIP's `visual_encoder` and `text_encoder`. Found others: "
            f"{str(error).splitlines()[0]}. Use the published file."
        ) from error
    if missing := sorted({*vision_report["missing_keys"], *text_report["missing_keys"]}):
        raise ValueError(
            f"{owner}: {source} must hold every weight of BLIP's two towers. Found {len(missing)} missing, such as "
            f"{missing[0]}. Download it again."
        )
    for model in (vision_model, text_model):
        check_finite(owner, model, source)
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"{owner}: the tokenizer must have at most the model's {text_config.vocab_size} tokens. Found {len(tokenizer)}. "
            "Use the tokenizer of bert-base-uncased."
        )
    size = vision_config.image_size
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return BLIPTower(vision_model, text_model, tokenizer, Preprocess(size, size, mean, std, centre="even"))


def _new_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _layers(weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(match[1]) for name in weights if (match := re.search(r"\.layers?\.(\d+)\.", name)))


def _vision_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_layers(weights),
        num_attention_heads=width // HEAD,
        image_size=patch * isqrt(weights["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=_layers(weights),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        bos_token_id=vocabulary - 2,
        sep_token_id=min(102, vocabulary - 1),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
