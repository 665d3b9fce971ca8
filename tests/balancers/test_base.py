"""The cadence, the smoothing, the merged gradient and the state that all methods share."""

from types import SimpleNamespace

import pytest
import torch

from balancers import MARBLE, Balancer, FixedWeights, WeightedSum
from balancers.levels import dry_run
from balancers.merging import smooth
from tests.helpers.small_balancers import Scripted, bound, gradients_of, step


@pytest.mark.parametrize("every", [1, 2, 5])
def test_refresh_every(every):
    balancer = bound(MARBLE(refresh_every=every))
    refreshed = [step(balancer, gradients_of(s))[0] is not None for s in range(11)]
    assert refreshed == [s % every == 0 for s in range(11)]


@pytest.mark.parametrize(
    ("share", "n", "wanted"), [(1.0, 4, 4), (0.25, 4, 1), (0.3, 10, 3), (0.7, 10, 7), (0.01, 3, 1), (0.0, 192, 1)]
)
def test_estimate_share_in_micro_batches(share, n, wanted):
    balancer = bound(MARBLE(estimate_share=share))
    balancer.begin_step(n)
    received = 0
    while balancer.wants_gradients:
        balancer.add_gradients(gradients_of(received))
        received += 1
    assert received == wanted
    # Gradients are summed over the micro-batches and then averaged over the ranks.
    reduced = []
    balancer.solve(lambda x: reduced.append(x.clone()) or x / 2)
    torch.testing.assert_close(reduced[0], sum(gradients_of(i) for i in range(wanted)))


def test_smoothing_by_hand():
    balancer = bound(Scripted([0.2, 0.3, 0.5], [1.0, 0.0, 0.0], ema_decay=0.7))
    _, first = step(balancer, gradients_of(0))
    _, second = step(balancer, gradients_of(1))
    torch.testing.assert_close(first, torch.tensor([0.2, 0.3, 0.5]))
    torch.testing.assert_close(second, torch.tensor([0.44, 0.21, 0.35]))


def test_fresh_weights_on_a_refresh_and_smoothed_ones_in_between():
    prepared = [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]
    balancer = bound(Scripted(*prepared, ema_decay=0.7, refresh_every=2, refresh_alpha="fresh"))
    step(balancer, torch.eye(3))
    step(balancer, torch.eye(3))
    merged, on_refresh = step(balancer, torch.eye(3))
    torch.testing.assert_close(merged, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(on_refresh, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(step(balancer, torch.eye(3))[1], torch.tensor([0.44, 0.21, 0.35]))


def test_merged_gradient_equals_the_formula_of_the_paper():
    gradients = gradients_of(3) * torch.tensor([[1.0], [10.0], [0.1]])
    balancer = bound(Scripted([0.2, 0.3, 0.5], normalize=True))
    merged, _ = step(balancer, gradients)
    norms = gradients.norm(dim=1, keepdim=True)
    unit = gradients / norms
    torch.testing.assert_close(merged, (torch.tensor([0.2, 0.3, 0.5]) @ unit) * norms.mean())
    torch.testing.assert_close(balancer.grams[0], (unit @ unit.T).double(), rtol=0, atol=1e-6)


def test_marble_update_opposes_no_reward():
    for seed in range(5):
        balancer = bound(MARBLE(ema_decay=0.0))
        gradients = gradients_of(seed, p=4)
        merged, _ = step(balancer, gradients)
        assert (gradients @ merged >= -1e-5).all()
        assert balancer.counts["update_conflicts"] == 0


def test_unit_gradients_on_a_refresh_and_raw_ones_in_between():
    gradients = gradients_of(3) * torch.tensor([[1.0], [10.0], [0.1]])
    norms, alpha = gradients.norm(dim=1), torch.tensor([0.2, 0.3, 0.5])
    balancer = bound(Scripted([0.2, 0.3, 0.5], normalize=True, refresh_every=2))
    torch.testing.assert_close(step(balancer, gradients)[1], alpha * norms.mean() / norms)
    torch.testing.assert_close(step(balancer, gradients)[1], alpha)


class Merging(Balancer):
    """Merges the rewards into numbers that are finite in float64 only."""

    merged_name = "sum"

    def merge_rewards(self, rewards, applies):
        return rewards.double().sum(1, keepdim=True) * 1e300


class MergingAdvantages(Merging):
    """Merges the advantages into numbers that are finite in float64 only."""

    merge_rewards = Balancer.merge_rewards

    def merge_advantages(self, advantages):
        return advantages.double().sum(1, keepdim=True) * 1e300


def test_levels_must_return_finite_numbers_in_float32():
    """Numbers that are finite in float64 only would silently become infinite weights or NaN advantages."""
    with pytest.raises(ValueError, match=r"`Scripted.weights` must return .* finite in float32"):
        step(bound(Scripted([0.1, 0.2, 1e300])), torch.eye(3))
    with pytest.raises(ValueError, match=r"finite in float32 after division by the norms. Found {'pick': "):
        step(bound(Scripted([1.0, 1.0, 3e38], normalize=True)), torch.diag(torch.tensor([1.0, 1.0, 0.01])))
    for balancer, level in ((Merging(), "merge_rewards"), (MergingAdvantages(), "merge_advantages")):
        with pytest.raises(ValueError, match=rf"`\w+.{level}` must return numbers that are finite in torch.float32"):
            dry_run(bound(balancer))


def test_uniform_stage():
    balancer = bound(MARBLE(refresh_every=1, uniform_after_step=2))
    refreshed, coefficients = zip(*(step(balancer, gradients_of(s)) for s in range(4)), strict=True)
    assert [merged is not None for merged in refreshed] == [True, True, False, False]
    assert coefficients[3].tolist() == pytest.approx([1 / 3] * 3)


def test_diagnostics_from_coefficients_equal_those_of_the_vectors():
    gradients = gradients_of(5, p=4)
    balancer = bound(MARBLE())
    merged, _ = step(balancer, gradients)
    for name, update in (("update", merged), ("mean", gradients.mean(0))):
        cos = torch.nn.functional.cosine_similarity(gradients, update[None])
        expected = [cos.min().item(), cos.mean().item(), cos.var(correction=0).item()]
        statistics = [balancer.diagnostics[f"{name}/cos_{statistic}"] for statistic in ("min", "mean", "var")]
        assert statistics == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(balancer.diagnostics["products"].own, gradients.double() @ gradients.double().T)
    torch.testing.assert_close(balancer.diagnostics["gradient_norms"].float(), gradients.norm(dim=1))
    torch.testing.assert_close(balancer.diagnostics["alpha"], balancer.diagnostics["alpha_smoothed"])


def test_conflicts_are_counted():
    gradients = torch.tensor([[10.0, 1.0], [-1.0, 1.0]])  # the plain mean opposes the second
    balancer = bound(MARBLE(refresh_every=1), ("a", "b"))
    for _ in range(3):
        step(balancer, gradients)
    assert balancer.counts == {"refreshes": 3, "update_conflicts": 0, "mean_conflicts": 3}


def test_setup_binds_the_rewards_of_the_module():
    balancer = MARBLE()
    balancer.setup(
        None, SimpleNamespace(rewards=torch.nn.ModuleDict({"b": torch.nn.Identity(), "a": torch.nn.Identity()})), "fit"
    )
    assert balancer.names == balancer.reward_names == ("b", "a")


@pytest.mark.parametrize("balancer", [WeightedSum(), FixedWeights(), MARBLE(uniform_after_step=0)])
def test_cheap_methods_never_want_gradients(balancer):
    bound(balancer)
    for s in range(3):
        assert step(balancer, gradients_of(s))[0] is None


def test_a_single_reward_needs_no_method():
    balancer = bound(MARBLE(), ("only",))
    merged, coefficients = step(balancer, torch.ones(1, 4))
    assert merged is None
    assert coefficients.tolist() == [1.0]


def test_levels_default_to_identity():
    balancer, rewards = bound(MARBLE()), torch.randn(4, 3)
    assert balancer.merge_rewards(rewards, torch.ones(4, 3, dtype=torch.bool)) is rewards
    assert balancer.merge_advantages(rewards) is rewards


def test_gradients_are_copied_and_freed():
    balancer, gradients = bound(MARBLE()), gradients_of(0)
    before = gradients.clone()
    balancer.begin_step(2)
    balancer.add_gradients(gradients)
    balancer.add_gradients(gradients)
    assert torch.equal(gradients, before)
    balancer.solve(lambda x: x)
    assert balancer._sum.total is None


def test_smoothing_is_per_reward():
    old, new = torch.tensor([1.0, torch.nan, 4.0]), torch.tensor([3.0, 5.0, torch.inf])
    assert smooth(old, new, torch.tensor([True, True, False]), 0.5).tolist() == [2.0, 5.0, 4.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "`refresh_every` must be >= 1. Found 0."),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\). Found 1.0."),
        ({"gram": "no"}, "`gram` must be 'own' or 'split'. Found 'no'."),
        ({"gram_decay": 1.0}, r"`gram_decay` must be in \[0, 1\). Found 1.0."),
        ({"signal_floor": 0.0}, r"`signal_floor` must be in \(0, 1\]. Found 0.0."),
        ({"refresh_alpha": "old"}, "`refresh_alpha` must be 'smoothed' or 'fresh'. Found 'old'."),
        ({"estimate_share": -0.1}, r"`estimate_share` must be in \[0, 1\]. Found -0.1."),
        ({"uniform_after_step": -1}, "`uniform_after_step` must be >= 0 or null. Found -1."),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MARBLE(**options)


def test_errors_of_the_call_order():
    balancer = MARBLE()
    with pytest.raises(ValueError, match="at least one reward"):
        balancer.bind(())
    with pytest.raises(TypeError, match="Balancer must override `weights` to merge 3 gradients"):
        dry_run(bound(Balancer()))
    bound(balancer)
    balancer.begin_step(2)
    with pytest.raises(ValueError, match=r"`gradients` must have shape \(3, P\). Found \(2, 4\)."):
        balancer.add_gradients(torch.ones(2, 4))
    balancer.add_gradients(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match=r"`solve` must follow 2 `add_gradients` of a refresh step, once. Found 1."):
        balancer.solve(lambda x: x)
    balancer.end_step()
    with pytest.raises(RuntimeError, match="`add_gradients` must be called while `wants_gradients`"):
        balancer.add_gradients(torch.ones(3, 4))
    for weights in ([1.0, 2.0], [1.0, 2.0, torch.nan]):
        with pytest.raises(ValueError, match=r"`Scripted.weights` must return a tensor of 3 numbers, .* finite"):
            dry_run(bound(Scripted(weights)))


def test_a_dry_run_does_not_copy_the_module():
    """Lightning sets methods of the module on every callback; a copy of them would copy all of its weights."""

    class Module:
        def log(self) -> None: ...

        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("the module was copied")

    balancer = bound(MARBLE())
    balancer.log = balancer.log_dict = Module().log
    dry_run(balancer)
