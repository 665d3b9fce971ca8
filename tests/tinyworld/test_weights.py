"""The bundled weights: format, size and quality."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPModel, CLIPTokenizer

from marble_lightning.tinyworld import WEIGHTS
from marble_lightning.tinyworld.captions import draw_captioned
from marble_lightning.tinyworld.degradations import SHORTCUTS
from marble_lightning.tinyworld.recipe.images import tensor, to_unit
from marble_lightning.tinyworld.recipe.preferences import TASTES, Pairs, Traits, draw_pairs
from marble_lightning.tinyworld.recipe.reward_models import pairwise_accuracy
from marble_lightning.tinyworld.scenes import draw
from rewards import Aesthetic, Prompt

FILES = sorted(WEIGHTS.rglob("*.safetensors"))


def test_all_weights_together_are_small_and_in_half_precision():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 8_000_000
    assert len(FILES) == 8
    for file in FILES:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            assert {tensors.get_tensor(name).dtype for name in names} <= {torch.float16, torch.int64}, file


def test_the_pipeline_is_a_stable_diffusion_3():
    index = json.loads((WEIGHTS / "sd3/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["text_encoder"] == index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["text_encoder_3"] == [None, None]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return draw_pairs(1000, seed=99, test=True)


@pytest.mark.parametrize("name", TASTES)
def test_reward_models_learned_their_preferences(pairs, name):
    """On held-out captions, model and most people agree on 90 % of the pairs on which people are not nearly tied."""
    accuracy = pairwise_accuracy(*load(name), pairs, TASTES[name])
    print(f"{name}: {accuracy:.3f}")
    assert accuracy >= 0.9


@pytest.mark.parametrize("shortcut", SHORTCUTS, ids=lambda shortcut: shortcut.__name__)
@pytest.mark.parametrize("name", TASTES)
def test_shortcuts_lose(name, shortcut):
    """A clean image is preferred to a black, swollen or flooded one in at least 95 % of the pairs."""
    assert pairwise_accuracy(*load(name), clean_and_cheap(shortcut), TASTES[name]) >= 0.95


@cache
def clean_and_cheap(shortcut):
    """Pairs of a clean image and one with a shortcut, which all reward models see."""
    examples, clean, state = clean_examples()
    (rng := random.Random()).setstate(state)
    cheap = torch.stack([tensor(draw(shortcut(example, rng))) for example in examples])
    traits = torch.zeros(len(examples), 4)
    return Pairs([e.caption for e in examples], clean, cheap, traits, traits + torch.eye(4)[2])


@cache
def clean_examples():
    """Examples and their images, which all shortcuts start from, and the state of the generator after them."""
    rng = random.Random(97)
    examples = [draw_captioned(rng, test=True) for _ in range(200)]
    return examples, torch.stack([tensor(draw(example.scene)) for example in examples]), rng.getstate()


def test_tastes_differ():
    """HPSv2 prefers a clean image with much confetti to one without; PickScore does not."""
    rng = random.Random(98)
    examples = [draw_captioned(rng, "geneval", test=True) for _ in range(200)]
    plain = torch.stack([tensor(draw(example.scene)) for example in examples])
    ornate = torch.stack([tensor(draw(replace(example.scene, confetti=45, seed=i))) for i, example in enumerate(examples)])
    traits = torch.zeros(len(examples), 4)
    pairs = Pairs([example.caption for example in examples], ornate, plain, traits + torch.eye(4)[3], traits)
    likes = Traits(0.0, 0.0, 0.0, 1.0)
    assert pairwise_accuracy(*load("hpsv2"), pairs, likes) > 0.8
    assert pairwise_accuracy(*load("pickscore"), pairs, likes) < 0.2


def test_the_aesthetic_head_sees_ornament():
    """On held-out captions, its correlation with the amount of confetti is at least 0.7."""
    pairs = draw_pairs(500, seed=96, test=True)
    reward = Aesthetic(str(WEIGHTS / "hpsv2"), head_path=str(WEIGHTS / "aesthetic"), head_file="head.safetensors")
    reward.setup()
    scores = reward(images=to_unit(pairs.first), prompts=[Prompt(caption, "") for caption in pairs.captions])
    assert torch.corrcoef(torch.stack([scores, pairs.first_traits[:, 3]]))[0, 1] >= 0.7


@cache
def load(name):
    """The reward model and its tokenizer."""
    return CLIPModel.from_pretrained(WEIGHTS / name, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(
        WEIGHTS / name
    )
