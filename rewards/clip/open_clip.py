"""Convert open_clip checkpoints to transformers models, and clean texts as open_clip does."""

import html
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's configuration of the base model of HPSv2."""

NAMES = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""(pattern, replacement) pairs from open_clip names to transformers names, applied in this order."""


def architecture(description: Mapping[str, Any]) -> Any:
    """Convert an open_clip configuration (`model_cfg` of open_clip_config.json) to a CLIPConfig with exact GELU."""
    from transformers import CLIPConfig

    vision, text = description["vision_cfg"], description["text_cfg"]
    end = text["vocab_size"] - 1
    return CLIPConfig(
        projection_dim=description["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            "hidden_act": "gelu",
        },
    )


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip model to the names of transformers' `CLIPModel`.

    The joint matrix of queries, keys and values is split into three. The two projections are transposed.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        if ".in_proj_" in new:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[new.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            result[new] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return result


def clean_text(text: str) -> str:
    """Clean a text as open_clip does: ftfy repair, HTML entities unescaped twice, whitespace collapsed, lower case.

    >>> clean_text("Salt &amp;amp;  pepper in a CafÃ©")
    'salt & pepper in a café'

    Source: open_clip's tokenizer, `basic_clean` and `whitespace_clean`.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
