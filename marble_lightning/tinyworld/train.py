"""Train the bundled weights from scratch: `python -m marble_lightning.tinyworld.train`.

Every stage is seeded. If the command runs again, each stage resumes from its last checkpoint in the work folder. Reward
models and base do not need each other: `--only rewards` and `--only base` train them at the same time, one on each core.
Once the first of the reward models is there, `--only hpsv2` and the like train the others at the same time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from marble_lightning.tinyworld.recipe.autoencoder import train_autoencoder
from marble_lightning.tinyworld.recipe.base import train_base
from marble_lightning.tinyworld.recipe.images import draw_training_images
from marble_lightning.tinyworld.recipe.preferences import TASTES
from marble_lightning.tinyworld.recipe.prompt_files import write_prompt_files
from marble_lightning.tinyworld.recipe.reward_models import train_reward_models
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer

PROMPT_SEED = 4


def main() -> None:
    """Run every stage of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="output folder of the weights")
    parser.add_argument("--work", type=Path, default=Path("runs/tinyworld"), help="folder of checkpoints and drawn scenes")
    parser.add_argument("--only", choices=("base", "rewards", *TASTES), help="train only this part")
    parser.add_argument("--images", type=int, default=80_000, help="number of training scenes")
    parser.add_argument("--spoiled", type=float, default=0.25, help="share of the base model's scenes with a fault")
    parser.add_argument("--autoencoder-steps", type=int, default=3500, help="optimizer steps of the autoencoder")
    parser.add_argument("--base-steps", type=int, default=9_400, help="optimizer steps of the base model")
    parser.add_argument("--reward-steps", type=int, default=6000, help="steps of the first reward model; others take half")
    parser.add_argument("--pairs", type=int, default=160_000, help="preference pairs of the reward models")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(options.work / "tokenizer", seed=0)
    if options.only in (None, "base"):
        training_images = draw_training_images(options.work, options.images, options.spoiled, seed=1)
        vae = train_autoencoder(training_images, options.work / "autoencoder", options.autoencoder_steps)
        pipeline = train_base(training_images, tokenizer, vae, options.work, options.base_steps)
        pipeline.to(dtype=torch.float16).save_pretrained(options.out / "sd3")
    if options.only != "base":
        names = [options.only] if options.only in TASTES else TASTES
        train_reward_models(names, tokenizer, options.work / "rewards", options.out, options.reward_steps, options.pairs)
    write_prompt_files(PROMPTS, PROMPT_SEED)


if __name__ == "__main__":
    main()
