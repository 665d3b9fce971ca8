"""A run's folder with a checkpoint, results and images, without training."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from marble_lightning.evaluation.results import read, write
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.finished_runs import finish
from tests.helpers.stock_pipeline import save_adapters

CONFIG = {
    "seed_everything": 3,
    "balancer": {"class_path": "balancers.MARBLE", "init_args": {"refresh_every": 5, "gram": None}},
    "model": {
        "rewards": {
            "ocr": {"class_path": "rewards.OCR", "init_args": {"detect": True}},
            "pickscore": {"class_path": "rewards.PickScore", "init_args": {"path": "yuvalkirstain/PickScore_v1"}},
        },
        "metrics": {"mine": {"class_path": "mine.Reward", "init_args": {"path": "/home/me/secret"}}},
    },
}


def finished_run(policy: SD3Policy, folder: Path, base: str) -> Path:
    """The checkpoint of a run of eight optimizer steps whose adapters are a policy's."""
    finish(folder, 3)
    results = read(folder)
    results["evaluated"] |= {"adapter": "ema"}
    results["settings"] |= {"guidance": 1.0, "resolution": 16}
    write(folder, results)
    (folder / "checkpoints").mkdir()
    file = save_adapters(policy, folder / "checkpoints")
    about = {"base_model": policy.identity | {"model": base}, "rewards": ["ocr", "pickscore"]}
    torch.save(torch.load(file, weights_only=True) | about | {"config": yaml.safe_dump(CONFIG)}, file)
    return file
