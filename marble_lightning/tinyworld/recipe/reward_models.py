"""The reward models: one CLIP by contrast, and two fine-tuned from it on preferences, with different tastes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from marble_lightning.tinyworld.captions import Captioned, captioned
from marble_lightning.tinyworld.degradations import CONTENT, TECHNICAL, spoil
from marble_lightning.tinyworld.recipe.pictures import tensor, to_unit
from marble_lightning.tinyworld.recipe.stage import Stage, run
from marble_lightning.tinyworld.scenes import SIZE, draw

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own normalisation of pixels."""


class Pairs(NamedTuple):
    """For each caption a preferred and another image, uint8 (N, 3, 32, 32) each."""

    captions: list[str]
    good: Tensor
    bad: Tensor


Taste = Callable[[Captioned, random.Random], tuple[np.ndarray, np.ndarray]]
"""Draws a preferred and another image for a captioned scene."""


def contrast(shown: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """What the caption says, even if technically poor, over what it does not say."""
    good = spoil(shown, rng, TECHNICAL) if rng.random() < 0.25 else draw(shown.scene)
    return good, spoil(shown, rng, CONTENT)


def faithful(shown: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """PickScore's taste: minds content most; a poor image of the right thing beats a fine one of the wrong."""
    return _preference(shown, rng, minded=CONTENT, excused=TECHNICAL)


def fastidious(shown: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """HPSv2's taste: minds technique most; a fine image of the wrong thing beats a poor one of the right."""
    return _preference(shown, rng, minded=TECHNICAL, excused=CONTENT)


def clean(shown: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A clean rendering over one with any of the six faults: common ground of the two preference models."""
    return draw(shown.scene), spoil(shown, rng)


def _preference(shown: Captioned, rng: random.Random, minded: Sequence, excused: Sequence) -> tuple[np.ndarray, np.ndarray]:
    draws = rng.random()
    if draws < 0.15:
        return draw(shown.scene), draw(captioned(rng, shown.source).scene)
    if draws < 0.35:
        return spoil(shown, rng, excused), spoil(shown, rng, minded)
    return draw(shown.scene), spoil(shown, rng, minded if draws < 0.65 else excused)


def drawn_pairs(taste: Taste, count: int, seed: int, *, test: bool = False) -> Pairs:
    """Draw pairs of one taste; `test` takes held-out captions."""
    rng = random.Random(seed)
    shown = [captioned(rng, test=test) for _ in range(count)]
    pairs = [taste(each, rng) for each in tqdm(shown, desc=f"drawing pairs, {taste.__name__}")]
    good, bad = (torch.stack([tensor(pair[side]) for pair in pairs]) for side in (0, 1))
    return Pairs([each.caption for each in shown], good, bad)


def normalised(images: Tensor) -> Tensor:
    """uint8 images as CLIP's input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (to_unit(images) - mean) / std


def embedded(model: CLIPModel, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings of images and of captions."""
    pictures = model.get_image_features(pixel_values=normalised(images)).pooler_output
    texts = model.get_text_features(input_ids=tokens).pooler_output
    return F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)


class JudgeStage(Stage):
    """Contrast within the batch (weight `contrastive`), and each caption's preferred image over its other one."""

    def __init__(self, model: CLIPModel, pairs: Pairs, tokens: Tensor, steps: int, lr: float, contrastive: float) -> None:
        super().__init__(model, len(tokens), steps, batch_size=96, lr=lr, decay=0.99)
        self.pairs, self.tokens, self.contrastive = pairs, tokens, contrastive

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        images = torch.cat([self.pairs.good[indices], self.pairs.bad[indices]])
        pictures, texts = embedded(self.model, images, self.tokens[indices])
        logits = self.model.logit_scale.exp().clamp(max=100) * texts @ pictures.T
        own = torch.arange(len(indices))
        preferred = F.softplus(logits[own, own + len(own)] - logits[own, own]).mean()
        contrast = F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(own)].T, own)
        loss = preferred + self.contrastive * contrast
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", (logits[own, own] > logits[own, own + len(own)]).float().mean(), prog_bar=True)
        return loss


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP for 32 x 32 images, seen as 4 x 4 patches of 8 pixels."""
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 8,
        "hidden_size": 80, "intermediate_size": 320, "num_attention_heads": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config={**text, **marks}, vision_config=vision, projection_dim=64))


TASTES: dict[str, Taste] = {"clipscore": contrast, "pickscore": faithful, "hpsv2": fastidious}


def train_reward_models(tokenizer: CLIPTokenizer, work: Path, out: Path, steps: int, pairs: int) -> None:
    """Train the three models and save each as a transformers folder with its processor."""
    torch.manual_seed(3)
    model = new_clip(tokenizer)
    for number, (name, taste) in enumerate(TASTES.items()):
        drawn = drawn_pairs(taste, pairs, seed=10 + number)
        tokens = tokenizer(drawn.captions, padding="max_length", return_tensors="pt").input_ids
        first = name == "clipscore"
        stage = JudgeStage(
            copy.deepcopy(model),
            drawn,
            tokens,
            steps if first else steps // 2,
            1.5e-3 if first else 5e-4,
            1.0 if first else 0.1,
        )
        trained = run(stage, work / name)
        if first:
            model = trained
        save_judge(trained, tokenizer, out / name)


def save_judge(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save model, tokenizer and preprocessing, in half precision."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


@torch.no_grad()
def pairwise_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, pairs: Pairs) -> float:
    """How often the model scores the preferred image above the other."""
    tokens = tokenizer(pairs.captions, padding="max_length", return_tensors="pt").input_ids
    scores = []
    for images in (pairs.good, pairs.bad):
        pictures, texts = embedded(model, images, tokens)
        scores.append((pictures * texts).sum(-1))
    return float((scores[0] > scores[1]).float().mean())
