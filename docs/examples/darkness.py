"""A custom reward with an option and a condition: how dark an image is, where the prompt asks for night."""

from rewards import Reward


class Darkness(Reward):
    """One minus the mean pixel, for prompts with a word.

    Args:
        word: the reward applies to prompts that contain it.
        sources: names of the prompt sets that it scores. None: all.
    """

    def __init__(self, word: str = "night", sources: list[str] | None = None) -> None:
        super().__init__(sources=sources)
        self.word = word

    def applies_to(self, prompt):
        return self.word in prompt.text

    def score(self, *, images, prompts):
        return 1 - images.mean((1, 2, 3))
