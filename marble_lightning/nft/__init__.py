"""DiffusionNFT (arXiv 2509.16117) with one advantage and one gradient per reward: a round is sampled, its scores become
advantages and loss coefficients, and each micro-batch gives a loss or the gradients of all rewards."""

from marble_lightning.nft.loss import Objective
from marble_lightning.nft.reward_gradients import RewardGradients
from marble_lightning.nft.sampling import Sampling
from marble_lightning.nft.step import TrainingStep

__all__ = ["Objective", "RewardGradients", "Sampling", "TrainingStep"]
