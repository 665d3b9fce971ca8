"""The signal's Gram matrix from halves: unbiased, convergent, and never worse than the gradients' own."""

import pytest
import torch

from balancers import min_norm_weights
from balancers.gramian import gram_matrix
from balancers.signal_gram import SignalGram, nearest_psd

K, P = 5, 200


def means(seed):
    """Signals of different lengths, one of which opposes the others."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(1, P, generator=draw, dtype=torch.float64))
    mu = torch.nn.functional.normalize(torch.randn(K, P, generator=draw, dtype=torch.float64)) + common
    mu[-1] -= 1.9 * common[0]
    return torch.nn.functional.normalize(mu) * torch.randn(K, 1, generator=draw, dtype=torch.float64).exp()


def halves(mu, ratio, draw):
    """Gradients of two halves; half of the noise is the same for all rewards, `ratio` is signal to noise of both halves."""
    lengths = mu.norm(dim=1, keepdim=True)

    def half():
        shared, own = (torch.randn(n, P, generator=draw, dtype=torch.float64) for n in (1, K))
        return mu + lengths * (shared + own) / P**0.5 / ratio

    return half(), half()


def averaged(mu, ratio, refreshes, seed, decay=0.9):
    """The estimator after some refreshes, and the last refresh's own Gram matrix."""
    draw, found = torch.Generator().manual_seed(seed), SignalGram(K, decay)
    for _ in range(refreshes):
        first, second = halves(mu, ratio, draw)
        own = gram_matrix((first + second) / 2)
        found.update(own, gram_matrix(first, second))
    return found, own


def test_products_of_halves_are_unbiased_and_own_products_are_not():
    mu = means(0)
    found, _ = averaged(mu, 0.3, 2000, seed=1, decay=1 - 1e-9)
    scale = mu.norm(dim=1).outer(mu.norm(dim=1))
    error = (found.variance / 2000).sqrt()
    apart = ~torch.eye(K, dtype=torch.bool)
    assert ((found.signal - mu @ mu.T).abs() < 4.5 * error)[apart].all()
    assert (((found.own - mu @ mu.T) / scale)[apart] > 2).all()  # the shared noise, 1 / 0.3^2 / 4


def test_the_error_falls_as_one_over_the_root_of_refreshes():
    mu, refreshes = means(0), [10, 30, 100, 300, 1000]
    scale = mu.norm(dim=1).outer(mu.norm(dim=1))
    errors = []
    for n in refreshes:
        found = [averaged(mu, 0.3, n, seed, decay=1 - 1e-9)[0].signal for seed in range(8)]
        errors.append(float(torch.stack([((signal - mu @ mu.T) / scale).square().mean() for signal in found]).mean().sqrt()))
    x, y = torch.tensor(refreshes).log(), torch.tensor(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-0.5, abs=0.1)


def worst_cosine(weights, mu):
    update = weights @ mu
    return float((mu @ update / mu.norm(dim=1) / update.norm()).min())


@pytest.mark.integration
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.1])
def test_the_worst_true_cosine_is_no_smaller_than_with_the_own_gram(ratio):
    """The mean over 200 trials of 60 refreshes, each with other signals, of the direction that is solved at the end."""
    split, own = [], []
    for seed in range(200):
        mu = means(seed)
        found, gram = averaged(mu, ratio, 60, seed)
        signal = found.estimate(floor=0.15)
        unit = nearest_psd(signal.gram / signal.lengths.outer(signal.lengths))
        split.append(worst_cosine(min_norm_weights(unit) / signal.lengths, mu))
        norms = gram.diagonal().sqrt()
        own.append(worst_cosine(min_norm_weights(gram / norms.outer(norms)) / norms, mu))
    difference = sum(split) / 200 - sum(own) / 200
    print(f"signal to noise {ratio}: split {sum(split) / 200:+.3f}, own {sum(own) / 200:+.3f}")
    assert difference > (0.0 if ratio == 1.0 else -0.02)


def test_without_a_signal_the_estimate_is_the_own_gram():
    shrinkage = [averaged(means(0), 1e-3, 20, seed)[0].estimate(0.15).shrinkage for seed in range(20)]
    assert sum(shrinkage) / 20 > 0.7
    exact = SignalGram(K, 0.9)
    exact.update(torch.eye(K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64))
    assert torch.equal(exact.estimate(0.15).gram, torch.eye(K, dtype=torch.float64))


def test_a_reward_absent_from_a_half_keeps_its_estimate():
    mu, draw = means(0), torch.Generator().manual_seed(0)
    found, _ = averaged(mu, 1.0, 5, seed=0)
    before = {name: getattr(found, name).clone() for name in ("own", "signal", "variance", "weight", "squares")}
    first, second = halves(mu, 1.0, draw)
    second[2] = torch.nan
    found.update(gram_matrix((first + second) / 2), gram_matrix(first, second))
    for name, values in before.items():
        changed = getattr(found, name) != values
        assert not changed[2].any() and not changed[:, 2].any() and changed[0, 1], name


def test_scale_of_a_gradient_does_not_matter():
    mu, scale = means(0), torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0], dtype=torch.float64)
    plain, scaled = SignalGram(K, 0.9), SignalGram(K, 0.9)
    for seed in range(5):
        first, second = halves(mu, 0.3, torch.Generator().manual_seed(seed))
        for found, factor in ((plain, torch.ones(K, 1)), (scaled, scale[:, None])):
            a, b = first * factor, second * factor
            found.update(gram_matrix((a + b) / 2), gram_matrix(a, b))
    one, other = plain.estimate(0.15), scaled.estimate(0.15)
    assert one.shrinkage == pytest.approx(other.shrinkage)
    torch.testing.assert_close(one.gram * scale.outer(scale), other.gram)
    torch.testing.assert_close(one.lengths * scale, other.lengths)
