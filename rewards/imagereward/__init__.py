"""ImageReward, a BLIP model with a head."""
