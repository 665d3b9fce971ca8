"""A custom reward with weights: a linear head on the mean colour of an image."""

import torch

from rewards import Reward


class Probe(Reward):
    """A linear function of the mean red, green and blue.

    Args:
        path: file with the state of a `torch.nn.Linear(3, 1)`.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.head = path, None

    def setup(self):
        if self.head is None:
            self.head = torch.nn.Linear(3, 1)
            self.head.load_state_dict(torch.load(self.path, weights_only=True))

    def score(self, *, images, prompts):
        return self.head(images.mean((2, 3)))[:, 0]
