"""DiffusionNFT (arXiv 2509.16117) with one advantage and one gradient per reward.

A round is sampled, advantages and loss coefficients are computed from its scores, and each micro-batch gives a loss or
the gradients of all rewards.
"""

from marble_lightning.nft.loss import Objective
from marble_lightning.nft.reward_gradients import RewardGradients
from marble_lightning.nft.sampling import Sampling
from marble_lightning.nft.step import TrainingStep

__all__ = ["Objective", "RewardGradients", "Sampling", "TrainingStep"]
