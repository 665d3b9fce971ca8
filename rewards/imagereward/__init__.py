"""ImageReward: a BLIP model with a head."""

from rewards.imagereward.reward import ImageReward

__all__ = ["ImageReward"]
