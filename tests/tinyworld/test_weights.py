"""The bundled weights: format, size and quality."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPModel, CLIPTokenizer

from marble_lightning.tinyworld import WEIGHTS
from marble_lightning.tinyworld.degradations import CONTENT, TECHNICAL, spoil
from marble_lightning.tinyworld.recipe.reward_models import (
    clean,
    contrast,
    draw_pairs,
    faithful,
    fastidious,
    pairwise_accuracy,
)

FILES = sorted(WEIGHTS.rglob("*.safetensors"))


def test_all_weights_together_are_small_and_in_half_precision():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 8_000_000
    assert len(FILES) == 7
    for file in FILES:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 - not a dict <= {torch.float16, torch.int64}


def test_the_pipeline_is_a_stable_diffusion_3():
    index = json.loads((WEIGHTS / "sd3/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["text_encoder"] == index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["text_encoder_3"] == [None, None]


@pytest.mark.parametrize(
    ("name", "taste"),
    [("clipscore", contrast), ("pickscore", faithful), ("pickscore", clean), ("hpsv2", fastidious), ("hpsv2", clean)],
)
def test_reward_models_learned_their_preferences(name, taste):
    """On held-out captions, the pairwise accuracy is at least 0.9."""
    model = CLIPModel.from_pretrained(WEIGHTS / name, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / name)
    assert pairwise_accuracy(model, tokenizer, draw_pairs(taste, 1000, seed=99, test=True)) >= 0.9


def test_tastes_differ():
    """The two preference models disagree on pairs of a technical fault and a content fault."""

    def technical_over_content(example, rng):
        return spoil(example, rng, TECHNICAL), spoil(example, rng, CONTENT)

    accuracy = {}
    for name in ("pickscore", "hpsv2"):
        model = CLIPModel.from_pretrained(WEIGHTS / name, dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / name)
        pairs = draw_pairs(technical_over_content, 500, seed=98, test=True)
        accuracy[name] = pairwise_accuracy(model, tokenizer, pairs)
    assert accuracy["pickscore"] > 0.8
    assert accuracy["hpsv2"] < 0.2
