"""Compiled blocks train as the plain ones do."""

from __future__ import annotations

import pytest
import torch

from balancers import MARBLE
from marble_lightning.cli import QUIET
from tests.helpers.small_runs import run


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("gradient_passes", ["two", "per_reward"])
def test_compiled_blocks_train_alike(checkpoints, tmp_path, gradient_passes):
    """With refreshes, whose per-reward gradients are tapped inside the blocks, and cheap steps."""
    options = {"rounds": 3, "gradient_passes": gradient_passes, "kl_weight": 0.5}
    (_, kept), (compiled, compiled_kept) = (
        run(checkpoints, tmp_path, MARBLE(refresh_every=2), compile=compile, **options) for compile in (False, True)
    )
    assert compiled.policy.transformer.transformer_blocks[0]._compiled_call_impl is not None
    for one, other in zip(kept.gradients, compiled_kept.gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]
