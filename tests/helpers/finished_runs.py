"""Folders of finished runs with known gains, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from marble_lightning.evaluation.results import HeldOutScores, document, write
from rewards import Prompt
from tests.helpers.small_rewards import Brightness

REWARDS = ("ocr", "geneval")
PROMPTS = 12


def begin(
    folder: Path, seed: int, rewards=REWARDS, ckpt_path: str | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """A run with its configuration, to which top-level `settings` are added; a dropped reward is null, as in config.yaml."""
    folder.mkdir(parents=True)
    of_rewards = {name: {} for name in rewards} | {name: None for name in (*REWARDS, "dropped") if name not in rewards}
    config = {"seed_everything": seed, "ckpt_path": ckpt_path, "model": {"rewards": of_rewards}}
    config |= settings or {}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def finish(
    folder: Path,
    seed: int,
    gains=(0.2, 0.1),
    rewards=REWARDS,
    prompts=PROMPTS,
    steps=8,
    scorer=Brightness,
    ckpt_path: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **facts,
) -> None:
    """A finished run with curves, images and held-out scores that change by `gains`, and noise.

    Args:
        folder: Folder of the run.
        seed: Its seed, also of its scores.
        gains: Change of each score.
        rewards: Rewards that it was trained on.
        prompts: Number of held-out prompts.
        steps: Optimizer steps, each a round; a resumed run does them all, and has no images of the base.
        scorer: Class of the reward models.
        ckpt_path: As in `config.yaml`.
        settings: As in `begin`.
        facts: More facts of the evaluated policy.
    """
    begin(folder, seed, rewards, ckpt_path, settings)
    draw = torch.Generator().manual_seed(seed)
    with SummaryWriter(str(folder)) as writer:
        for step in range(steps):
            for name in rewards:
                writer.add_scalar(f"train/{name}", 0.1 * step, step)
                writer.add_scalar(f"alpha_smoothed/{name}", 1 / len(rewards), step)
                writer.add_scalar(f"cosine/update/own/{name}", -0.1 if step % 4 == 0 else 0.3, step)
                writer.add_scalar(f"cosine/update/split/{name}", 0.1 if step % 4 == 0 else -0.05, step)
                writer.add_scalar(f"signal_to_noise/{name}", 0.1 * seed, step)
            writer.add_scalar("harmony/split/chance", 0.7, step)
            writer.add_scalar("images/brightness", 1 - 0.05 * step, step)
            writer.add_scalar("time/training", 2.0, step)
    for step in (0, steps) if ckpt_path is None else (steps,):
        Image.new("RGB", (40, 20)).save(folder / f"held_out_{step:06d}.png")
    base = torch.rand(prompts, 2, generator=draw)
    trained = base + torch.tensor(gains) + 0.05 * torch.randn(prompts, 2, generator=draw)
    named = {index: Prompt(f"prompt {index}", "x") for index in range(prompts)}
    held_out = HeldOutScores({name: scorer() for name in REWARDS}, named, trained, base)
    evaluated = {"balancer": "MARBLE", "optimizer_step": steps, "refresh_every": 5, **facts}
    peak = {"of": "process", "gib": 1.5 + seed / 4}
    write(folder, document(held_out, evaluated=evaluated, settings={"steps": 24, "seed": seed}, peak_memory=peak))
