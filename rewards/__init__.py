"""Rewards: how good an image is for its prompt, one number per (image, prompt) pair.

A `Reward` is a frozen `nn.Module` that scores images of shape (B, 3, H, W) with values in [0, 1] against B prompts and
returns B numbers; higher is better. A reward may apply to some prompts only: a spelling reward needs quoted text, and a
counting reward needs the object to count. `Reward.applies_to` defines which prompts a reward can score. A missing score is
NaN, never 0. Weights load in `setup`, so building a reward is cheap.

A custom reward is a subclass of `Reward` that overrides `score`:

    class Brightness(Reward):
        def score(self, *, images, prompts):
            return images.mean(dim=(1, 2, 3))

This package is independent of policies, gradients and training.
"""

from lazy_loader import attach_stub

# the names of __init__.pyi, each imported when it is first used
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
