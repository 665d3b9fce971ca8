"""Online reinforcement learning of Stable Diffusion 3 on several rewards at once.

A `DiffusionNFT` module wraps an `SD3Policy` (the stock pipeline, a frozen base, three LoRA adapters) and a dictionary of
rewards. One epoch is one round: the prompts of a `PromptDataModule` are sampled with the old adapter, scored, turned into
advantages, and trained on. How the rewards are merged is the business of a callback from `balancers`. `Sampling`,
`Objective`, `Averaging` and `Evaluation` are its groups of settings, `solvers` its samplers, `tinyworld` a small world that
runs on a laptop.
"""

from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.rollout import Sampling
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.sd3 import SD3Policy

__all__ = ["Averaging", "DiffusionNFT", "Evaluation", "Objective", "PromptDataModule", "SD3Policy", "Sampling"]
