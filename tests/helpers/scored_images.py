"""Images, rewards that fail or wait, and how a scorer scores with them."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from rewards import Prompt, Reward

PROMPTS = [Prompt(f"image {index}", "even" if index % 2 == 0 else "odd") for index in range(6)]


IMAGES = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4).contiguous()


class Brightness(Reward):
    def score(self, *, images, prompts):
        return images.mean((1, 2, 3))


class Even(Brightness):
    def applies_to(self, prompt):
        return prompt.source == "even"


class Broken(Brightness):
    """Fails on some prompts, with an exception or an infinite score."""

    def __init__(self, texts=(), infinite=False):
        super().__init__()
        self.texts, self.infinite = texts, infinite

    def score(self, *, images, prompts):
        wrong = torch.tensor([prompt.text in self.texts for prompt in prompts])
        if wrong.any() and not self.infinite:
            raise ZeroDivisionError("no letters")
        return torch.where(wrong, torch.inf, super().score(images=images, prompts=prompts))


class Flaky(Brightness):
    """Fails to connect the first few times."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def score(self, *, images, prompts):
        self.times -= 1
        if self.times >= 0:
            raise ConnectionError("refused")
        return super().score(images=images, prompts=prompts)


class Blocked(Brightness):
    """Waits for an event, or forever on some prompts."""

    def __init__(self, stuck=()):
        super().__init__()
        self.released, self.stuck, self.threads = threading.Event(), stuck, set()

    def score(self, *, images, prompts):
        self.threads.add(threading.current_thread().name)
        if any(prompt.text in self.stuck for prompt in prompts):
            threading.Event().wait()
        self.released.wait(10)
        return super().score(images=images, prompts=prompts)


class Ranks:
    """A strategy with given counts of the other ranks."""

    root_device = torch.device("cpu")

    def __init__(self, others=0.0):
        self.others = others

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor + torch.as_tensor(self.others)


def scores(rewards, folder=Path(), size=2, **settings):
    """Score in batches; returns the scores and the number of images that each reward failed on."""
    scorer = Scorer(rewards, Scoring(**settings))
    scorer.setup(folder, "")
    for start in range(0, 6, size):
        scorer.submit(IMAGES[start : start + size], PROMPTS[start : start + size], rewards)
    result = scorer.collect()
    assert all(seconds > 0 for seconds in scorer.seconds.values())
    return result, scorer.check(Ranks())
