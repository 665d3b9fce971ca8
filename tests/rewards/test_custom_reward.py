"""A custom reward of ten lines; the base class checks inputs and scores."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rewards import JPEGCompressibility, Prompt, Reward


class Brightness(Reward):
    """Mean pixel value, for prompts with the word "bright"."""

    def applies_to(self, prompt):
        return "bright" in prompt.text

    def score(self, *, images, prompts):
        return images.mean(dim=(1, 2, 3))


PROMPTS = [Prompt("a bright day", "a"), Prompt("a dark night", "a"), Prompt("a bright idea", "b")]
IMAGES = torch.stack([torch.full((3, 4, 4), value) for value in (0.25, 0.5, 0.75)])


def test_a_custom_reward_needs_only_score() -> None:
    reward = Brightness()
    reward.setup()
    scores = reward(images=IMAGES, prompts=PROMPTS)
    assert torch.equal(scores.nan_to_num(-1), torch.tensor([0.25, -1, 0.75]))
    assert reward.batch_size == 32
    assert reward.missing == 0  # the dark night is not a missing score: the reward does not apply to it


def test_sources_work_with_an_overridden_applies_to() -> None:
    """`Brightness.applies_to` does not check the source."""
    scores = Brightness(sources=["b"])(images=IMAGES, prompts=PROMPTS)
    assert torch.equal(scores.nan_to_num(-1), torch.tensor([-1, -1, 0.75]))
    assert Brightness(sources=["b"]).identity != Brightness().identity


def test_identities_name_bundled_rewards_by_package_and_custom_ones_by_module(monkeypatch) -> None:
    assert JPEGCompressibility().identity["class"] == "rewards.JPEGCompressibility"
    monkeypatch.setattr(Brightness, "__module__", "mine.scores")  # as before, also if `mine` exports it
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Brightness=Brightness))
    assert Brightness().identity["class"] == "mine.scores.Brightness"


def test_modules_of_setup_are_in_evaluation_mode_for_every_caller() -> None:
    class Dropping(Brightness):
        def setup(self):
            self.dropout = torch.nn.Dropout(0.5)

        def score(self, *, images, prompts):
            return super().score(images=self.dropout(images), prompts=prompts)

    for prepare in (Dropping.eval, Dropping.train, Dropping.double):  # the last one changes no mode
        reward = prepare(Dropping())
        reward.setup()
        for _ in range(2):
            assert torch.equal(reward(images=IMAGES, prompts=[PROMPTS[0]] * 3), IMAGES.mean((1, 2, 3)))


def test_batch_size_from_class_or_argument() -> None:
    sizes = []

    class Pairs(Brightness):
        batch_size = 2

        def score(self, *, images, prompts):
            sizes.append(len(images))
            return super().score(images=images, prompts=prompts)

    bright = [PROMPTS[0]] * 3
    Pairs()(images=IMAGES, prompts=bright)
    Pairs(batch_size=3)(images=IMAGES, prompts=bright)
    assert sizes == [2, 1, 3]


def test_missing_scores_are_counted_and_stay_missing() -> None:
    class Picky(Brightness):
        def score(self, *, images, prompts):
            return torch.where(images.mean(dim=(1, 2, 3)) > 0.5, 1.0, torch.nan)

    picky = Picky()
    for rounds in (1, 2):
        scores = picky(images=IMAGES, prompts=PROMPTS)
        assert scores.isnan().tolist() == [True, True, False]
        assert picky.missing == rounds
    assert Picky().missing == 0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(2, 1), r"shape \(2,\), one score per image. Found \(2, 1\)"),
        (torch.zeros(2, 2), r"Found \(2, 2\)"),  # every prompt with every image
        (torch.zeros(()), r"Found \(\)"),
        ([0.0, 0.0], r"Found list\. Convert it"),
        (np.zeros(2), r"Found numpy\.ndarray\. Convert it"),
        (None, "Found NoneType"),
        (torch.zeros(2, dtype=torch.complex64), r"Found a tensor of torch\.complex64"),
        (torch.tensor([0.0, torch.inf]), "finite in float32.* Found inf"),
        (torch.tensor([0.0, -1e300], dtype=torch.float64), r"finite in float32.* Found -1e\+300"),
    ],
)
def test_bad_results_are_refused(result: object, message: str) -> None:
    class Wrong(Brightness):
        def score(self, *, images, prompts):
            return result

    with pytest.raises((TypeError, ValueError), match=f"^Wrong: `score` must .*{message}"):
        Wrong()(images=IMAGES, prompts=PROMPTS)


def test_score_must_be_overridden() -> None:
    class Nothing(Reward):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()


def test_score_runs_without_gradients_on_float32() -> None:
    inputs = {}

    class Spy(Brightness):
        def score(self, *, images, prompts):
            inputs.update(dtype=images.dtype, grad=torch.is_grad_enabled())
            return super().score(images=images, prompts=prompts)

    Spy()(images=IMAGES.half(), prompts=PROMPTS)
    assert inputs == {"dtype": torch.float32, "grad": False}
