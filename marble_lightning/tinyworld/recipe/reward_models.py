"""The reward models: a contrastive CLIP, and two models fine-tuned from it on different preferences."""

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

from marble_lightning.tinyworld.captions import Captioned, draw_captioned
from marble_lightning.tinyworld.degradations import CONTENT, TECHNICAL, spoil
from marble_lightning.tinyworld.recipe.images import tensor, to_unit
from marble_lightning.tinyworld.recipe.stage import Stage, run
from marble_lightning.tinyworld.scenes import SIZE, draw

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of pixels."""


class Pairs(NamedTuple):
    """For each caption, a preferred image (`good`) and another image (`bad`), each uint8 (N, 3, 32, 32)."""

    captions: list[str]
    good: Tensor
    bad: Tensor


Taste = Callable[[Captioned, random.Random], tuple[np.ndarray, np.ndarray]]
"""A function that draws a preferred image and another image for a captioned scene."""


def contrast(example: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Prefer an image that matches the caption, even with a technical fault, to one that does not match."""
    good = spoil(example, rng, TECHNICAL) if rng.random() < 0.25 else draw(example.scene)
    return good, spoil(example, rng, CONTENT)


def faithful(example: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """PickScore's taste: content matters most. A technical fault is preferred to a content fault."""
    return _preference(example, rng, major=CONTENT, minor=TECHNICAL)


def fastidious(example: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """HPSv2's taste: technical quality matters most. A content fault is preferred to a technical fault."""
    return _preference(example, rng, major=TECHNICAL, minor=CONTENT)


def clean(example: Captioned, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Prefer a clean image to one with any of the six faults; both preference models agree on these pairs."""
    return draw(example.scene), spoil(example, rng)


def _preference(example: Captioned, rng: random.Random, major: Sequence, minor: Sequence) -> tuple[np.ndarray, np.ndarray]:
    kind = rng.random()
    if kind < 0.15:
        return draw(example.scene), draw(draw_captioned(rng, example.source).scene)
    if kind < 0.35:
        return spoil(example, rng, minor), spoil(example, rng, major)
    return draw(example.scene), spoil(example, rng, major if kind < 0.65 else minor)


def draw_pairs(taste: Taste, count: int, seed: int, *, test: bool = False) -> Pairs:
    """Draw pairs of one taste; `test` uses held-out captions."""
    rng = random.Random(seed)
    examples = [draw_captioned(rng, test=test) for _ in range(count)]
    pairs = [taste(example, rng) for example in tqdm(examples, desc=f"drawing pairs, {taste.__name__}")]
    good, bad = (torch.stack([tensor(pair[side]) for pair in pairs]) for side in (0, 1))
    return Pairs([example.caption for example in examples], good, bad)


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 images to CLIP's input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (to_unit(images) - mean) / std


def embed(model: CLIPModel, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return L2-normalised embeddings of images and of captions."""
    image_embeddings = model.get_image_features(pixel_values=normalise(images)).pooler_output
    text_embeddings = model.get_text_features(input_ids=tokens).pooler_output
    return F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)


class RewardModelStage(Stage):
    """Preference loss between the two images of each caption, plus `contrastive` times the contrastive batch loss."""

    def __init__(self, model: CLIPModel, pairs: Pairs, tokens: Tensor, steps: int, lr: float, contrastive: float) -> None:
        super().__init__(model, len(tokens), steps, batch_size=96, lr=lr, decay=0.99)
        self.pairs, self.tokens, self.contrastive = pairs, tokens, contrastive

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        images = torch.cat([self.pairs.good[indices], self.pairs.bad[indices]])
        image_embeddings, text_embeddings = embed(self.model, images, self.tokens[indices])
        logits = self.model.logit_scale.exp().clamp(max=100) * text_embeddings @ image_embeddings.T
        rows = torch.arange(len(indices))  # caption i belongs to images i (preferred) and i + len(rows)
        good, bad = logits[rows, rows], logits[rows, rows + len(rows)]
        preference_loss = F.softplus(bad - good).mean()
        contrastive_loss = F.cross_entropy(logits, rows) + F.cross_entropy(logits[:, : len(rows)].T, rows)
        loss = preference_loss + self.contrastive * contrastive_loss
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", (good > bad).float().mean(), prog_bar=True)
        return loss


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a small CLIP for 32 x 32 images, with 4 x 4 patches of 8 x 8 pixels."""
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 8,
        "hidden_size": 80, "intermediate_size": 320, "num_attention_heads": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config={**text, **special_tokens}, vision_config=vision, projection_dim=64))


TASTES: dict[str, Taste] = {"clipscore": contrast, "pickscore": faithful, "hpsv2": fastidious}


def train_reward_models(tokenizer: CLIPTokenizer, work: Path, out: Path, steps: int, pairs: int) -> None:
    """Train the three models and save each as a transformers folder with its processor."""
    torch.manual_seed(3)
    model = new_clip(tokenizer)
    for number, (name, taste) in enumerate(TASTES.items()):
        training_pairs = draw_pairs(taste, pairs, seed=10 + number)
        tokens = tokenizer(training_pairs.captions, padding="max_length", return_tensors="pt").input_ids
        first = name == "clipscore"
        stage = RewardModelStage(
            copy.deepcopy(model),
            training_pairs,
            tokens,
            steps if first else steps // 2,
            1.5e-3 if first else 5e-4,
            1.0 if first else 0.1,
        )
        trained = run(stage, work / name)
        if first:
            model = trained
        save_reward_model(trained, tokenizer, out / name)


def save_reward_model(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save the model in half precision, with its tokenizer and preprocessing."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


@torch.no_grad()
def pairwise_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, pairs: Pairs) -> float:
    """Return the share of pairs in which the model scores the preferred image above the other."""
    tokens = tokenizer(pairs.captions, padding="max_length", return_tensors="pt").input_ids
    scores = []
    for images in (pairs.good, pairs.bad):
        image_embeddings, text_embeddings = embed(model, images, tokens)
        scores.append((image_embeddings * text_embeddings).sum(-1))
    return float((scores[0] > scores[1]).float().mean())
