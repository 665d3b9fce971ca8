"""Metrics that fall although rewards rise."""

from __future__ import annotations

import torch

from marble_lightning.evaluation.fallen_metrics import fallen_metrics

BASE = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
KINDS = {"ocr": True, "pickscore": True, "aesthetic": False}


def messages(*shifts: float) -> list[str]:
    """After each column of scores has changed by a mean shift, with spread 0.1 over prompts."""
    noise = 0.1 * torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    return fallen_metrics(KINDS, BASE, BASE + noise - noise.mean(0) + torch.tensor(shifts))


def test_a_metric_falls_while_a_reward_rises():
    (message,) = messages(0.5, 0.0, -0.4)
    assert (
        message.startswith("held_out/aesthetic has fallen below the base's by 0.4 ± 0.0") and "although ocr rose" in message
    )


def test_no_warning_without_both():
    assert messages(0.5, 0.5, 0.4) == messages(-0.5, 0.0, -0.4) == []  # nothing fell; nothing rose
    assert messages(0.5, -0.4, 0.0) == []  # what fell is trained on
    assert messages(0.5, 0.5, -0.02) == []  # by less than chance: the standard error is 0.1 / 20 ** 0.5


def test_missing_scores_and_equal_changes():
    trained = BASE + torch.tensor([0.5, torch.nan, -0.4])
    assert len(fallen_metrics(KINDS, BASE, trained)) == 1
    trained[1:, 2] = torch.nan  # one prompt says nothing
    assert fallen_metrics(KINDS, BASE, trained) == fallen_metrics(KINDS, BASE, BASE) == []
