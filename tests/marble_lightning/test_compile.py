"""Training with compiled blocks."""

from __future__ import annotations

import pytest
import torch

from balancers import MARBLE
from marble_lightning.command_line import QUIET
from marble_lightning.policies import SD3Policy, ZImagePolicy
from tests.helpers.small_runs import run


@pytest.mark.parametrize("kind", ["sd3", "z_image"])
def test_every_block_is_compiled_and_nothing_else(checkpoints, request, kind):
    """Code is compiled at its first call, so this takes no time."""
    if kind == "sd3":
        policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, compile=True)
    else:
        policy = ZImagePolicy(str(request.getfixturevalue("z_image")), resolution=16, rank=2, text_length=64, compile=True)
    policy.setup(0)
    blocks = getattr(policy.transformer, "transformer_blocks" if kind == "sd3" else "layers")
    compiled = [module for module in policy.transformer.modules() if module._compiled_call_impl is not None]
    assert len(blocks) and set(blocks) <= set(compiled)
    assert {type(module) for module in compiled} == {type(blocks[0])}
    assert torch._dynamo.config.optimize_ddp is False


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
