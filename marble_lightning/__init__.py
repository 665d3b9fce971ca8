"""Online reinforcement learning of Stable Diffusion 3 on several rewards at once.

A `DiffusionNFT` module wraps an `SD3Policy` (the stock pipeline, a frozen base, three LoRA adapters) and a dictionary of
rewards. One epoch is one round: the prompts of a `PromptDataModule` are sampled with the old adapter, scored, turned into
advantages, and trained on. A callback from `balancers` merges the rewards. `Sampling`, `Objective`, `Averaging`, `Scoring`
and `Evaluation` are groups of settings; `tinyworld` has small models and data that run on a laptop.
"""

from marble_lightning import _shadowing as _shadowing  # first: it checks what the others import
from marble_lightning.data import PromptDataModule
from marble_lightning.evaluation import Evaluation
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft import Objective, Sampling
from marble_lightning.policies import Averaging, FlowPolicy, SD3Policy
from marble_lightning.scoring import Scoring

__all__ = [
    "Averaging",
    "DiffusionNFT",
    "Evaluation",
    "FlowPolicy",
    "Objective",
    "PromptDataModule",
    "SD3Policy",
    "Sampling",
    "Scoring",
]
