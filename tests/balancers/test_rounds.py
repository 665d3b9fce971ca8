"""Methods that use the scores of each round: WeightedSum with `weights: std`, Sequential and OutcomeGuard."""

import math
from types import SimpleNamespace

import pytest
import torch

from balancers import AdvantageSum, Balancer, OutcomeGuard, Sequential, WeightedSum
from balancers.levels import dry_run
from balancers.spread import spread, squared_deviations
from marble_lightning.nft.advantages import group_advantages
from tests.helpers.small_balancers import NAMES, bound, gradients_of, step

PROMPTS = torch.arange(4).repeat_interleave(6)
STD = torch.tensor([1.0, 0.1, 20.0])


def scores_of(seed, means=(0.0, 0.0, 0.0)):
    """Scores of 24 images of 4 prompts, whose spreads differ; the last two rewards do not apply to some prompts."""
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(24, 3, generator=draws) * STD + torch.randn(4, 3, generator=draws)[PROMPTS] * 3 * STD
    scores = scores + torch.tensor(means)
    scores[:6, 1] = scores[18:, 2] = torch.nan
    return scores


def resumed(balancer, again, file, bind_first):
    """`again` with the balancer's state, which went through a file that is loaded as a checkpoint is."""
    torch.save(balancer.state_dict(), file)
    if bind_first:
        again.bind(NAMES)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.bind(NAMES)
    return again


def test_squared_deviations_of_rounds_add_up():
    first, second = scores_of(0), scores_of(1)
    totals = squared_deviations(first, PROMPTS) + squared_deviations(second, PROMPTS)
    together = squared_deviations(torch.cat([first, second]), torch.cat([PROMPTS, PROMPTS + 4]))
    torch.testing.assert_close(totals, together)
    groups = [scores[prompt == PROMPTS, 1] for scores in (first, second) for prompt in (1, 2, 3)]
    expected = torch.stack([group.var(correction=0) for group in groups]).mean().sqrt()
    torch.testing.assert_close(spread(totals)[1].float(), expected)


def test_equal_scores_have_no_spread():
    scores = torch.full((9, 2), 0.1) * torch.tensor([1.0, 3.0])
    scores[0, 1] = torch.inf
    totals = squared_deviations(scores, torch.zeros(9, dtype=torch.int64))
    assert totals.tolist() == [[0.0, 0.0], [9.0, 8.0]]
    assert spread(torch.zeros(2, 2)).tolist() == [0.0, 0.0]


def test_weights_are_inverse_standard_deviations_over_rounds():
    balancer = bound(WeightedSum("std"))
    for seed in range(50):
        figures = balancer.begin_round(scores_of(seed), PROMPTS)
    within = STD * (5 / 6) ** 0.5  # of the deviations from the mean of six
    torch.testing.assert_close(balancer.reward_weights.float(), 1 / within, rtol=0.05, atol=0)
    assert list(figures) == [f"reward_weight/{name}" for name in NAMES]
    assert list(figures.values()) == balancer.reward_weights.tolist()


def test_a_reward_without_spread_has_no_weight():
    balancer = bound(WeightedSum("std"))
    dry_run(balancer)
    scores = torch.tensor([[1.0, 5.0, torch.nan], [3.0, 5.0, torch.nan], [torch.nan, 5.0, torch.nan]])
    balancer.begin_round(scores, torch.zeros(3, dtype=torch.int64))
    merged = balancer.merge_rewards(scores, ~scores.isnan())
    torch.testing.assert_close(merged, torch.tensor([[1.0], [3.0], [0.0]]))  # the mean over rewards with weight


def test_the_sum_is_nearly_advantage_sum():
    """Where prompts do not differ and every reward applies, both scales are nearly the same."""
    scores = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * STD
    prompts = torch.arange(20).repeat_interleave(20)
    balancer = bound(WeightedSum("std", reduction="sum"))
    balancer.begin_round(scores, prompts)
    of_rewards = group_advantages(balancer.merge_rewards(scores, ~scores.isnan()), prompts)
    of_advantages = bound(AdvantageSum()).merge_advantages(group_advantages(scores, prompts))
    assert torch.corrcoef(torch.cat([of_rewards, of_advantages], 1).T)[0, 1] > 0.999


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("kind", [lambda: WeightedSum("std"), lambda: Sequential(2), lambda: OutcomeGuard(window=2)])
def test_state_round_trip_continues_bit_for_bit(tmp_path, kind, bind_first):
    def play(balancer, seed):
        scores = scores_of(seed, (-0.3 * seed, 0.0, 0.0))
        figures = balancer.begin_round(scores, PROMPTS)
        return figures, torch.cat([balancer.merge_rewards(scores, ~scores.isnan()).flatten(), balancer.loss_weights])

    whole = bound(kind())
    for seed in range(4):
        play(whole, seed)
    again = resumed(whole, kind(), tmp_path / "state.pt", bind_first)
    assert torch.equal(again.loss_weights, whole.loss_weights)
    for seed in range(4, 8):
        (figures, first), (same, second) = play(whole, seed), play(again, seed)
        assert figures == same
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert play(bound(kind()), 8)[0] != play(whole, 8)[0]


def test_sequential_trains_one_reward_after_another():
    balancer = bound(Sequential(rounds=2))
    dry_run(balancer)
    scores, trained = scores_of(0), []
    for _ in range(8):
        figures = balancer.begin_round(scores, PROMPTS)
        trained.append(balancer.current)
        torch.testing.assert_close(
            balancer.merge_rewards(scores, ~scores.isnan())[:, 0], scores[:, NAMES.index(trained[-1])], equal_nan=True
        )
        assert figures == {f"turn/{name}": float(name == trained[-1]) for name in NAMES}
    assert trained == ["clip", "clip", "ocr", "ocr", "pick", "pick", "clip", "clip"]
    assert balancer.names == ("turn",) and not balancer.needs_gradients
    ordered = bound(Sequential(1, ["pick", "pick", "clip"]))
    assert [ordered.begin_round(scores, PROMPTS) and ordered.current for _ in range(4)] == ["pick", "pick", "clip", "pick"]
    shared = Sequential()
    shared.setup(SimpleNamespace(max_epochs=7), SimpleNamespace(rewards=dict.fromkeys(NAMES)), "fit")
    shares = [shared.begin_round(scores, PROMPTS) and shared.current for _ in range(7)]
    assert shares == ["clip", "clip", "clip", "ocr", "ocr", "pick", "pick"]


@pytest.mark.parametrize(("rounds", "skipped"), [(2, "pick will"), (None, "pick will"), (1, None)])
def test_rewards_without_a_turn_are_named(caplog, rounds, skipped):
    """Three rewards in four rounds by twos, in two rounds, and in three."""
    trainer = SimpleNamespace(max_epochs=3 if skipped is None else 4 if rounds else 2)
    module = SimpleNamespace(rewards=dict.fromkeys(NAMES))
    Sequential(rounds).setup(trainer, module, "validate")
    assert not caplog.text
    Sequential(rounds).setup(trainer, module, "fit")
    assert f"too few for all turns: {skipped} not be trained on" in caplog.text if skipped else not caplog.text


@pytest.mark.parametrize("max_epochs", [-1, None])
def test_a_run_without_an_end_needs_the_rounds_of_a_turn(max_epochs):
    trainer, module = SimpleNamespace(max_epochs=max_epochs), SimpleNamespace(rewards=dict.fromkeys(NAMES))
    with pytest.raises(ValueError, match=f"`rounds` must be set in a run without an end.*max_epochs` {max_epochs};"):
        Sequential().setup(trainer, module, "fit")
    Sequential().setup(trainer, module, "validate")
    endless = Sequential(rounds=1)
    endless.setup(trainer, module, "fit")
    assert [endless.begin_round(scores_of(0), PROMPTS) and endless.current for _ in range(4)] == [*NAMES, "clip"]


def test_a_turn_without_images_is_reported(caplog):
    balancer, scores = bound(Sequential(rounds=1)), scores_of(0)
    scores[:, 1] = torch.nan
    balancer.begin_round(scores, PROMPTS)
    assert not caplog.text
    balancer.begin_round(scores, PROMPTS)
    assert "`ocr`, the reward of this turn, applies to no image of this round" in caplog.text


def test_errors():
    for make, message in (
        (lambda: Sequential(0), "`rounds` must be null or >= 1. Found 0"),
        (lambda: Sequential(order=[]), "`order` must name the reward of at least one turn"),
        (
            lambda: bound(Sequential(order=["typo"])),
            "`order` must use the names of the rewards: clip, ocr, pick. Found typo",
        ),
        (lambda: WeightedSum("var"), "`weights` must be numbers by reward name, 'std' or null. Found 'var'"),
        (lambda: OutcomeGuard(rate=0), "`rate` must be finite and > 0. Found 0"),
        (lambda: OutcomeGuard(window=0), "`window` must be >= 1 rounds. Found 0"),
        (lambda: OutcomeGuard(max_multiplier=1), "`max_multiplier` must be finite and > 1. Found 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def exact(mean, std=1.0):
    """Scores of two images of a prompt with this mean and standard deviation."""
    return torch.tensor([mean - std, mean + std])


def guarded(balancer, *means):
    """Begin a round in which each reward has a mean score, or applies to no image (None)."""
    columns = [torch.full((2,), torch.nan) if mean is None else exact(mean) for mean in means]
    return balancer.begin_round(torch.stack(columns, 1), torch.zeros(2, dtype=torch.int64))


def test_multipliers_by_hand():
    balancer = bound(OutcomeGuard(rate=0.5, window=1, max_multiplier=2.0), ("a", "b"))
    assert balancer.loss_weights.tolist() == [0.5, 0.5]
    assert guarded(balancer, 1.0, 1.0) == {"multiplier/a": 1.0, "multiplier/b": 1.0}  # the start
    guarded(balancer, 0.4, 1.5)
    assert balancer.multipliers == {"a": pytest.approx(math.exp(0.5 * 0.6)), "b": 1.0}
    share = math.exp(0.3) / (1 + math.exp(0.3))
    assert balancer.loss_weights.tolist() == pytest.approx([share, 1 - share])
    guarded(balancer, 1.2, None)  # above its start: decays
    assert balancer.multipliers["a"] == pytest.approx(math.exp(0.3 - 0.1))
    guarded(balancer, 2.0, -20.0)
    assert balancer.multipliers == {"a": 1.0, "b": pytest.approx(2.0)}


def test_a_window_averages_rounds_and_skips_absent_rewards():
    balancer = bound(OutcomeGuard(rate=1.0, window=2), ("a", "b"))
    for a, b in ((0.0, None), (1.0, 3.0), (-1.0, None), (0.0, 5.0)):
        guarded(balancer, a, b)
    # a: the start 0.5, then the means 0 and -0.5; b: the start 4, after its second round
    assert balancer.multipliers == {"a": pytest.approx(math.exp(0.5 + 1.0)), "b": 1.0}
    assert balancer.memory["starts"] == {"a": 0.5, "b": 4.0}


def test_a_constant_reward_has_no_multiplier():
    balancer = bound(OutcomeGuard(window=1), ("a", "b"))
    for value in (1.0, 0.0):
        balancer.begin_round(torch.full((2, 2), value), torch.zeros(2, dtype=torch.int64))
    assert balancer.multipliers == {"a": 1.0, "b": 1.0}


def simulated(balancer, rounds=300):
    """Means of rewards that oppose each other after each round: b falls unless it has 60 % of the weight."""
    means, after = torch.zeros(2), []
    for seed in range(rounds):
        noise = 0.05 * torch.randn(2, generator=torch.Generator().manual_seed(seed))
        guarded(balancer, *(means + noise).tolist())
        a, b = balancer.loss_weights.tolist()
        means = means + torch.tensor([0.02 * a, 0.1 * (b - 0.6 * (a + b))])
        after.append([*means.tolist(), b / a])
    return torch.tensor(after)


def test_a_falling_reward_is_brought_back_to_its_start():
    unguarded, balancer = bound(Balancer(), ("a", "b")), bound(OutcomeGuard(), ("a", "b"))
    assert simulated(unguarded)[-1, 1] < -2.9
    gained, protected, multiplier = simulated(balancer).T
    assert protected.abs().max() < 0.3 and gained[-1] > 2  # in standard deviations
    assert balancer.multipliers["a"] == 1.0
    assert 1 < multiplier[100:].mean() < 2 and multiplier.max() < 3  # around 1.5, which is 60 % of the weight


def test_the_guard_weights_normalised_gradients():
    balancer = bound(OutcomeGuard(rate=0.5, window=1, normalize=True))
    guarded(balancer, 1.0, 1.0, 1.0)
    guarded(balancer, 1.0, 1.0, 0.0)
    gradients = gradients_of(0) * torch.tensor([[1.0], [10.0], [0.1]])
    merged, _ = step(balancer, gradients)
    weights = torch.tensor([1.0, 1.0, math.exp(0.5)])
    norms = gradients.norm(dim=1)
    torch.testing.assert_close(merged, weights / weights.sum() @ (gradients / norms[:, None]) * norms.mean())


def test_other_methods_ignore_the_scores():
    assert bound(WeightedSum()).begin_round(scores_of(0), PROMPTS) == {}
    assert bound(AdvantageSum()).begin_round(scores_of(0), PROMPTS) == {}
