"""The reward models: a CLIP trained on the mean taste, three fine-tuned from it on their own, and a head for ornament."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from marble_lightning.tinyworld.recipe.images import load_or_make, to_unit
from marble_lightning.tinyworld.recipe.muon import Muon
from marble_lightning.tinyworld.recipe.preferences import MEAN_TASTE, TASTES, Pairs, Taste, draw_pairs
from marble_lightning.tinyworld.recipe.stage import Stage, run
from marble_lightning.tinyworld.scenes import SIZE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of pixels."""
FIRST_LOGIT_SCALE = 64.0
"""That of the first stage."""
LOGIT_SCALES = {"clipscore": 64.0, "pickscore": 64.0, "hpsv2": 40.0}
"""Log-odds per unit of cosine. They set the spreads of the scores: cosines of two images differ by log-odds over this."""
RIDGE = 1e-6
"""Penalty of the head's squared weights, beside the mean square error."""
CONTRASTIVE_SCALE = 20.0
"""Factor of the cosines in the contrastive loss. Images share captions' meanings, so it is smaller than CLIP's 100."""


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 images to CLIP's input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (to_unit(images) - mean) / std


def embed(model: CLIPModel, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return L2-normalised embeddings of images (N, 3, 64, 64) and of captions (M, T)."""
    image_embeddings = model.get_image_features(pixel_values=normalise(images)).pooler_output
    text_embeddings = model.get_text_features(input_ids=tokens).pooler_output
    return F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)


class RewardModelStage(Stage):
    """Cross entropy between the share of people who prefer the first image and the model's, as in PickScore's training.

    The first stage adds `contrastive` times CLIP's loss between captions and preferred images, which teaches words; without
    it a model learns what images have in common far sooner than what they have to do with their captions.
    """

    def __init__(
        self,
        model: CLIPModel,
        pairs: Pairs,
        tokens: Tensor,
        taste: Taste,
        steps: int,
        *,
        logit_scale: float,
        contrastive: float = 0.0,
    ) -> None:
        super().__init__(model, len(tokens), steps, batch_size=96, lr=1e-3, decay=0.998)
        self.pairs, self.tokens, self.logit_scale, self.contrastive = pairs, tokens, logit_scale, contrastive
        self.people = pairs.log_odds(taste).sigmoid()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return Muon.of_layers(self.model, "encoder.layers", self.lr)

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        images = torch.cat([self.pairs.first[indices], self.pairs.second[indices]])
        image_embeddings, text_embeddings = embed(self.model, images, self.tokens[indices])
        first, second = (text_embeddings * image_embeddings.unflatten(0, (2, -1))).sum(-1)
        odds, people = self.logit_scale * (first - second), self.people[indices]
        loss = F.binary_cross_entropy_with_logits(odds, people)
        if self.contrastive:
            rows = torch.arange(len(indices))
            preferred = image_embeddings[torch.where(people >= 0.5, rows, rows + len(rows))]
            logits = CONTRASTIVE_SCALE * text_embeddings @ preferred.T
            loss = loss + self.contrastive * (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", ((odds > 0) == (people > 0.5))[people != 0.5].float().mean(), prog_bar=True)
        return loss


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a small CLIP for 64 x 64 images, with 4 x 4 patches of 16 x 16 pixels."""
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": 72, "intermediate_size": 288, "num_attention_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 16,
        "hidden_size": 72, "intermediate_size": 288, "num_attention_heads": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config={**text, **special_tokens}, vision_config=vision, projection_dim=64))


def train_reward_models(
    names: Iterable[str], tokenizer: CLIPTokenizer, work: Path, out: Path, steps: int, count: int
) -> None:
    """Train reward models, each saved as a transformers folder with its processor, and with HPSv2 the head for ornament.

    Args:
        names: Which of `TASTES`.
        tokenizer: Tokenizer of the captions.
        work: Folder of the checkpoints.
        out: Folder of the results.
        steps: Optimizer steps of the first stage; each fine-tuning takes half.
        count: Number of preference pairs.
    """
    torch.manual_seed(3)
    pairs = Pairs(*load_or_make(work / f"pairs-{count}.pt", lambda: tuple(draw_pairs(count, seed=10))))
    tokens = tokenizer(pairs.captions, padding="max_length", return_tensors="pt").input_ids
    clip = new_clip(tokenizer)
    stage = RewardModelStage(clip, pairs, tokens, MEAN_TASTE, steps, logit_scale=FIRST_LOGIT_SCALE, contrastive=0.5)
    first = run(stage, work / "first")
    for name in names:
        clip, scale = copy.deepcopy(first), LOGIT_SCALES[name]
        model = run(RewardModelStage(clip, pairs, tokens, TASTES[name], steps // 2, logit_scale=scale), work / name)
        save_reward_model(model, tokenizer, out / name)
        if name == "hpsv2":
            save_ornament_head(model, pairs, out / "aesthetic")


def save_reward_model(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save the model in half precision, with its tokenizer and preprocessing.

    PickScore multiplies the cosine by the logit scale, and gets that of the training. CLIPScore also divides by 100, and
    gets CLIP's 100, so that it is the cosine.
    """
    model = copy.deepcopy(model).half()
    model.logit_scale.data.fill_(math.log(100.0 if folder.name == "clipscore" else LOGIT_SCALES[folder.name]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


@torch.no_grad()
def save_ornament_head(model: CLIPModel, pairs: Pairs, folder: Path) -> None:
    """Fit ten times the amount of confetti by ridge regression on image embeddings, in the format of LAION's linear head.

    Without the penalty, differences of nearly equal embeddings get weights that half precision cannot hold.
    """
    images = torch.cat([pairs.first[:8000], pairs.second[:8000]])
    target = 10 * torch.cat([pairs.first_traits[:8000, -1], pairs.second_traits[:8000, -1]]).double()
    chunks = [model.get_image_features(pixel_values=normalise(chunk)).pooler_output for chunk in images.split(500)]
    embeddings = F.normalize(torch.cat(chunks), dim=-1).double()
    centred, mean = embeddings - embeddings.mean(0), target.mean()
    moments = centred.T @ centred / len(centred) + RIDGE * torch.eye(centred.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(moments, centred.T @ (target - mean) / len(centred))
    bias = mean - weight @ embeddings.mean(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight[None].half().contiguous(), "bias": bias[None].half()}, folder / "head.safetensors")


@torch.no_grad()
def pairwise_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, pairs: Pairs, taste: Taste, least: float = 0.5) -> float:
    """Return the share of pairs in which model and most people agree, of those with log-odds of at least `least`."""
    tokens = tokenizer(pairs.captions, padding="max_length", return_tensors="pt").input_ids
    odds = pairs.log_odds(taste)
    image_embeddings, text_embeddings = embed(model, torch.cat([pairs.first, pairs.second]), tokens)
    first, second = (text_embeddings * image_embeddings.unflatten(0, (2, -1))).sum(-1)
    return float(((first > second) == (odds > 0))[odds.abs() >= least].float().mean())
