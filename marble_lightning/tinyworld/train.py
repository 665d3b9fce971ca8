"""Make the bundled weights again from nothing: `python -m marble_lightning.tinyworld.train`.

Every stage is seeded and resumes from its last checkpoint in the work folder when the command is run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from marble_lightning.tinyworld.recipe.autoencoder import train_autoencoder
from marble_lightning.tinyworld.recipe.base import train_base
from marble_lightning.tinyworld.recipe.pictures import drawn_pictures
from marble_lightning.tinyworld.recipe.prompt_files import write_prompt_files
from marble_lightning.tinyworld.recipe.reward_models import train_reward_models
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer

PROMPT_SEED = 4


def main() -> None:
    """Run every stage of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder the weights are written to")
    parser.add_argument("--work", type=Path, default=Path("runs/tinyworld"), help="folder of checkpoints and drawn scenes")
    parser.add_argument("--images", type=int, default=60_000, help="training scenes")
    parser.add_argument("--spoiled", type=float, default=0.3, help="share of the base model's scenes that have a fault")
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--base-steps", type=int, default=20_000)
    parser.add_argument("--judge-steps", type=int, default=1600)
    parser.add_argument("--pairs", type=int, default=24_000, help="preference pairs of each reward model")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(options.work / "tokenizer", seed=0)
    pictures = drawn_pictures(options.work, options.images, options.spoiled, seed=1)
    vae = train_autoencoder(pictures, options.work / "autoencoder", options.autoencoder_steps)
    pipeline = train_base(pictures, tokenizer, vae, options.work, options.base_steps)
    pipeline.to(dtype=torch.float16).save_pretrained(options.out / "sd3")
    train_reward_models(tokenizer, options.work / "judges", options.out, options.judge_steps, options.pairs)
    write_prompt_files(PROMPTS, PROMPT_SEED)


if __name__ == "__main__":
    main()
