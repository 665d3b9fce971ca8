"""ImageReward: a BLIP model with a regression head."""

from rewards.imagereward.reward import ImageReward

__all__ = ["ImageReward"]
