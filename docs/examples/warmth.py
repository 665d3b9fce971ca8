"""A custom reward: how much more red than blue an image has."""

from rewards import Reward


class Warmth(Reward):
    def score(self, *, images, prompts):  # images (B, 3, H, W) in [0, 1]; prompts have text, source, metadata
        return (images[:, 0] - images[:, 2]).mean((1, 2))
