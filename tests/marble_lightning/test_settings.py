"""Settings made in Python are checked like those of the command line."""

from __future__ import annotations

import pytest

from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.averaging import Averaging


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (Sampling, {"solver": "heun"}, "`sampling.solver` must be one of dpm2, euler. Found 'heun'"),
        (Evaluation, {"solver": "heun"}, "`evaluation.solver` must be one of dpm2, euler. Found 'heun'"),
        (Objective, {"advantage_std": "batch"}, "`objective.advantage_std` must be one of round, group. Found 'batch'"),
        (
            Objective,
            {"advantage_mode": "best"},
            "`objective.advantage_mode` must be one of all, positive_only, .* Found 'best'",
        ),
    ],
)
def test_unknown_choices_are_refused(group, options, message):
    with pytest.raises(ValueError, match=message):
        group(**options)


def test_the_warm_up_of_the_average():
    """The release's decay min((1 + s) / (10 + s), 0.9) after optimizer step s, counted from 1."""
    assert [Averaging().averaged_decay(step) for step in (1, 100)] == [0.9, 0.9]
    warm = Averaging(ema_warmup=True)
    assert [warm.averaged_decay(step) for step in (1, 2, 79, 80, 81, 500)] == [2 / 11, 3 / 12, 80 / 89, 0.9, 0.9, 0.9]
