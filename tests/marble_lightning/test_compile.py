"""Training with compiled blocks."""

from __future__ import annotations

import pytest
import torch

from balancers import MARBLE
from marble_lightning.command_line import QUIET
from tests.helpers.small_runs import run


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("gradient_passes", ["two", "per_reward"])
def test_compiled_blocks_give_the_same_gradients(checkpoints, tmp_path, gradient_passes):
    """With refreshes, which capture gradients inside the blocks, and with the steps between them."""
    options = {"rounds": 3, "gradient_passes": gradient_passes, "kl_weight": 0.5}
    (_, plain_recorded), (compiled, compiled_recorded) = (
        run(checkpoints, tmp_path, MARBLE(refresh_every=2), compile=compile, **options) for compile in (False, True)
    )
    assert compiled.policy.transformer.transformer_blocks[0]._compiled_call_impl is not None
    for one, other in zip(plain_recorded.gradients, compiled_recorded.gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]
