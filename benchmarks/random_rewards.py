"""Rewards and metrics of configs/sd35m.yaml with random weights, and images to score, for benchmarks without checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

import rewards
from rewards.clip.loading import convert_precision
from rewards.clip.open_clip import VIT_H_14, architecture
from rewards.clip.tower import CLIPTower, Preprocess
from rewards.geneval.coco import COCO_CLASSES
from rewards.geneval.instances import DetectorPreprocess
from rewards.imagereward.blip import BLIPTower

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architectures:
    """Configurations of the networks.

    Args:
        vit_h: open_clip's description of the CLIP model of PickScore and HPSv2.
        clip_l: transformers' configuration of the CLIP model of CLIPScore, Aesthetic and GenEval's colours.
        swin: Backbone of GenEval's detector.
        mask2former: The rest of the detector, where it differs from transformers' defaults.
        blip_text: Text model of ImageReward, where it differs from transformers' defaults.
        detector_side: Pixels of the shorter side of the detector's input.
    """

    vit_h: Config
    clip_l: Config
    swin: Config
    mask2former: Config
    blip_text: Config
    detector_side: int


FULL = Architectures(
    vit_h=VIT_H_14,
    clip_l={
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "projection_dim": 768,
    },
    swin={"depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "embed_dim": 96},
    mask2former={},
    blip_text={"num_attention_heads": 12},
    detector_side=800,
)  # fmt: skip
"""As published: ViT-H-14, openai/clip-vit-large-patch14, Mask2Former with Swin-S, BLIP."""
SMALL = Architectures(
    vit_h={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 16, "head_width": 8, "patch_size": 56},
        "text_cfg": {"context_length": 77, "vocab_size": 4096, "width": 16, "heads": 2, "layers": 1},
    },
    clip_l={
        "text_config": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 56,
        },
        "projection_dim": 16,
    },
    swin={"depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "embed_dim": 16, "window_size": 4},
    mask2former={
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
        "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 10,
    },
    blip_text={"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    detector_side=64,
)  # fmt: skip
"""A few layers of little width, for tests."""


def build_rewards(
    tokenizer: Any, dtype: str, device: str, sizes: Architectures = FULL
) -> tuple[dict[str, rewards.Reward], dict[str, rewards.Reward]]:
    """Build the rewards and metrics of configs/sd35m.yaml that have weights in torch, so without OCR.

    Texts are not cleaned, and every network takes the same tokenizer.

    Args:
        tokenizer: CLIP tokenizer, with at most the networks' number of tokens.
        dtype: Precision of the weights.
        device: Device that the weights are drawn on; `meta` allocates no memory.
        sizes: Configurations of the networks.

    Returns:
        Rewards by name, and metrics by name. CLIPScore, Aesthetic and GenEval's colours share a model.
    """
    mean_and_std, precision = ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), getattr(torch, dtype)

    def tower(config: Any) -> CLIPTower:
        return CLIPTower(convert_precision(CLIPModel(config), precision), tokenizer, Preprocess(224, 224, *mean_and_std))

    reward_models = {"pickscore": rewards.PickScore(), "hpsv2": rewards.HPSv2(), "clipscore": rewards.CLIPScore()}
    detector, aesthetic = rewards.Mask2Former(), rewards.Aesthetic()
    with torch.device(device):
        for name in ("pickscore", "hpsv2"):
            reward_models[name].tower = tower(architecture(sizes.vit_h))
        shared = tower(CLIPConfig(**sizes.clip_l))
        reward_models["clipscore"].tower = detector.classifier.tower = aesthetic.tower = shared
        aesthetic.head = nn.Sequential(nn.Linear(sizes.clip_l["projection_dim"], 1))
        detector.model = build_detector(sizes).to(precision)
    detector.preprocess = DetectorPreprocess(sizes.detector_side, 1333, 32, 1.0, *mean_and_std)
    detector.names = list(COCO_CLASSES)
    metrics = {
        "geneval_accuracy": rewards.GenEval(detector, "accuracy", batch_size=8),
        "aesthetic": aesthetic,
        "imagereward": build_imagereward(tokenizer, precision, device, sizes),
    }
    return {**reward_models, "geneval": rewards.GenEval(detector, batch_size=8)}, metrics


def build_detector(sizes: Architectures) -> Any:
    """Build GenEval's detector on torch's default device."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**sizes.swin, out_features=stages), num_labels=80, **sizes.mask2former
    )
    return Mask2FormerForUniversalSegmentation(config).requires_grad_(False).eval()


def build_imagereward(tokenizer: Any, dtype: torch.dtype, device: str, sizes: Architectures) -> rewards.ImageReward:
    """Build ImageReward with a linear head on a device."""
    reward, width = rewards.ImageReward(), sizes.clip_l["vision_config"]["hidden_size"]
    with torch.device(device):
        vision = BlipVisionModel(BlipVisionConfig(**sizes.clip_l["vision_config"] | {"image_size": 224, "patch_size": 16}))
        text = BlipTextModel(BlipTextConfig(encoder_hidden_size=width, **sizes.blip_text), add_pooling_layer=False)
        reward.head = nn.Sequential(nn.Linear(text.config.hidden_size, 1))
    preprocess = Preprocess(224, 224, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    reward.tower = BLIPTower(vision.to(dtype), text.to(dtype), tokenizer, preprocess)
    return reward


def rendered(count: int, size: int) -> Tensor:
    """Images with the text "Word N", (count, 3, size, size) in [0, 1]."""
    images = []
    for index in range(count):
        image = Image.new("RGB", (size, size), "white")
        font = ImageFont.load_default(size // 6)
        ImageDraw.Draw(image).text((size / 2, size / 2), f"Word {index}", fill="black", font=font, anchor="mm")
        images.append(torch.from_numpy(np.array(image)))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255
