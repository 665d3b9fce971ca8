"""The state of a balancer in a checkpoint."""

import copy

import pytest
import torch

from balancers import MARBLE
from tests.helpers.small_balancers import NAMES, bound, gradients_of, step

SAMPLES = torch.ones(2, len(NAMES))


def parts_of(seed):
    """Gradients in two parts, from halves."""
    return torch.stack([gradients_of(seed), gradients_of(100 + seed)])


@pytest.mark.parametrize("gram", ["own", "split"])
@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("stop", [3, 4])
def test_state_round_trip_continues_bit_for_bit(tmp_path, gram, bind_first, stop):
    options = {"refresh_every": 3, "gram": gram, "gram_decay": 0.9, "uniform_after_step": 9}
    whole = bound(MARBLE(**options))
    for s in range(stop):
        step(whole, parts_of(s), samples=SAMPLES)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = MARBLE(**options)
    if bind_first:
        resumed.bind(NAMES)
    resumed.load_state_dict(state)
    resumed.bind(NAMES)
    for s in range(stop, 11):
        (merged_a, coefficients_a), (merged_b, coefficients_b) = (
            step(b, parts_of(s), samples=SAMPLES) for b in (whole, resumed)
        )
        assert (merged_a is None) == (merged_b is None)
        assert merged_a is None or torch.equal(merged_a, merged_b)
        assert torch.equal(coefficients_a, coefficients_b)
    assert whole.counts == resumed.counts


def test_later_steps_do_not_change_a_state_dict():
    balancer = bound(MARBLE(refresh_every=1))
    step(balancer, gradients_of(0))
    state = balancer.state_dict()
    before = copy.deepcopy(state)
    step(balancer, gradients_of(1))
    assert torch.equal(state["alpha_smoothed"], before["alpha_smoothed"])
    assert state["counts"] == before["counts"]


@pytest.mark.parametrize("bind_first", [True, False])
def test_rewards_must_equal_those_of_the_checkpoint(bind_first):
    state, balancer = bound(MARBLE()).state_dict(), MARBLE()
    first, second = (lambda: balancer.bind(("clip", "geneval"))), (lambda: balancer.load_state_dict(state))
    if not bind_first:
        first, second = second, first
    first()
    with pytest.raises(ValueError, match=r"`rewards` must stay the same(?=.*geneval)(?=.*clip, ocr, pick)"):
        second()
