"""Licences of the published weights that rewards load, as their authors' repositories state them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewards.files import BUNDLED

LICENCES = {
    "CodeGoat24/UnifiedReward-2.0-qwen-7b": "MIT",
    "CodeGoat24/UnifiedReward-7b-v1.5": "MIT",
    "facebook/mask2former-swin-small-coco-instance": "MIT in its README, `other` in its hub tag",
    "google-bert/bert-base-uncased": "Apache-2.0",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "MIT",
    "MizzenAI/HPSv3": "Apache-2.0",
    "openai/clip-vit-large-patch14": "MIT",
    "Qwen/Qwen2-VL-7B-Instruct": "Apache-2.0",
    "Qwen/Qwen3-VL-8B-Instruct": "Apache-2.0",
    "THUDM/ImageReward": "Apache-2.0",
    "trl-lib/ddpo-aesthetic-predictor": "Apache-2.0",
    "xswu/HPSv2": "Apache-2.0",
    "yuvalkirstain/PickScore_v1": "MIT",
}
"""Licence of each hub repository."""

INSTALLED = {"rewards.OCR": "PP-OCR models in RapidOCR's wheel (Apache-2.0)"}
"""Weights of classes that load them from an installed package."""


def weights_of(settings: Mapping[str, Any]) -> list[str]:
    """Describe the weights of a reward with their licences, for people.

    Args:
        settings: The reward in a configuration: `class_path` and `init_args`.

    Returns:
        One text for each folder or repository; empty for a reward without weights. A local folder is not named, since its
        path may be private.

    >>> weights_of({"class_path": "rewards.PickScore", "init_args": {"path": "yuvalkirstain/PickScore_v1"}})
    ['yuvalkirstain/PickScore_v1 (MIT)']
    """
    paths = dict.fromkeys(_paths(settings.get("init_args") or {}))
    installed = INSTALLED.get(settings.get("class_path", ""))
    return list(dict.fromkeys(map(_describe, paths))) + ([installed] if installed else [])


def _describe(path: str) -> str:
    if path in LICENCES:
        return f"{path} ({LICENCES[path]})"
    if path.startswith(BUNDLED):
        return "bundled with MARBLE Lightning (Apache-2.0)"
    return "other weights (licence not known here)"


def _paths(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _paths(value)
        elif isinstance(value, str) and (name in ("path", "model") or name.endswith("_path")) and name != "class_path":
            yield value
