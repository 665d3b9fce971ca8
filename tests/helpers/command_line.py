"""Command lines on the random checkpoints, and readers of the files they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from marble_lightning.command_line import MarbleCLI
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.module import DiffusionNFT
from tests.helpers import ROOT


def small_options(checkpoints: Path, folder: Path) -> list[str]:
    """Options of the fixture `small`, with any folder for the runs."""
    clip = str(checkpoints / "clip")
    options = {
        "trainer.logger.save_dir": folder,
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 2,
        "trainer.enable_progress_bar": False,
        "data.folder": ROOT / "marble_lightning/tinyworld/prompts",
        "data.cap_per_source": 60,
        "data.prompts_per_round": 6,
        "data.images_per_prompt": 4,
        "data.held_out_per_source": 2,
        "data.held_out_images": 1,
        "model.policy.path": checkpoints / "sd3",
        "model.policy.resolution": 16,
        "model.policy.rank": 2,
        "model.rewards.pickscore.path": clip,
        "model.rewards.hpsv2.path": clip,
        "model.rewards.clipscore.path": clip,
        "model.sampling.steps": 4,
        "model.sampling.times_per_image": 2,
        "model.sampling.batch_size": 12,
        "model.evaluation.steps": 2,
        "model.micro_batch_size": 12,
        "model.optimizer_steps_per_round": 1,
        "memory.check": "off",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-c", str(ROOT / "configs/tiny.yaml"), *flags]


EXTRA = {
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 3,
    "data.held_out_batch_size": 3,
    "balancer": "MARBLE",
    "balancer.refresh_every": 2,
    "balancer.gram": "split",
    "balancer.gram_decay": 0.9,
    "model.metrics": "{}",
    "model.rewards": "{clipscore: {class_path: rewards.CLIPScore, init_args: {path: CLIP}}, jpeg: JPEGCompressibility}",
    "model.objective.kl_every": 2,
    "model.optimizer_steps_per_round": 2,
    "model.lr_scheduler": "torch.optim.lr_scheduler.ExponentialLR",
    "model.lr_scheduler.gamma": 0.8,
}
"""Added to `small`: three rounds of four micro-batches and two optimizer steps, with fast rewards."""


def options(checkpoints: Path, folder: Path, **more: Any) -> list[str]:
    extra = EXTRA | {"trainer.default_root_dir": folder} | more
    if extra["balancer"] == "WeightedSum":  # it has no refreshes
        extra = {name: value for name, value in extra.items() if not name.startswith("balancer.")}
    extra["model.rewards"] = str(extra["model.rewards"]).replace("CLIP}", f"{checkpoints / 'clip'}}}")
    return [
        *small_options(checkpoints, folder),
        *(part for name, value in extra.items() for part in (f"--{name}", str(value))),
    ]


def last(folder: Path, version: int = 0) -> Path:
    return folder / f"tiny/version_{version}/checkpoints/last.ckpt"


def state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without the configuration and the lists of checkpoint files."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    del content["config"]  # it names folders
    callbacks = {name: state for name, state in content["callbacks"].items() if "Checkpoint" not in name}
    return content | {"callbacks": callbacks}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nested states differ, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)) else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [difference for key in one for difference in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [difference for index, pair in pairs for difference in differences(*pair, f"{path}/{index}")]
    return [] if one == other else [f"{path}: {one!r}, {other!r}"]


def fit_with(options: list[str], *callbacks: Callback) -> None:
    MarbleCLI(
        DiffusionNFT,
        PromptDataModule,
        args=["fit", *options],
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [*callbacks]},
    )


def column(shown: str, title: str) -> dict[str, str]:
    """A column of the printed table of all prompt sets, by reward."""
    rows = [
        line.strip("│┃").replace("┃", "│").split("│")
        for line in shown.partition("all, 6 prompts")[2].partition("└")[0].splitlines()
        if line[:1] in ("│", "┃")
    ]
    cells = [[cell.strip() for cell in row] for row in rows]
    index = cells[0].index(title)
    return {row[0]: row[index] for row in cells[1:]}
