"""Statistics of comparisons: gains relative to those of specialists."""

import torch

from marble_lightning.evaluation.statistics import normalised_gains


def test_normalised_gains_are_shares_of_the_specialists():
    prompts = torch.tensor([1.0, 2.0, 3.0])
    changes = torch.stack([prompts / 2, -prompts, prompts], -1)[None].repeat(2, 1, 1)
    changes[:, 2, 0] = torch.nan  # the reward does not apply to this prompt
    specialists = torch.stack([prompts, prompts, torch.tensor([-4.0, 0.0, 5.0])], -1)[None].repeat(3, 1, 1)
    specialists[:, 2, 0] = torch.nan
    gains = normalised_gains(changes, specialists)
    torch.testing.assert_close(gains, torch.tensor([0.5, -1.0, torch.nan], dtype=torch.float64), equal_nan=True)
    assert normalised_gains(changes, specialists[:1]).isfinite().tolist() == [True, True, False]  # errors over prompts
