"""The signal's Gram matrix from halves: unbiased, convergent, and never worse than the gradients' own."""

import pytest
import torch

from balancers import min_norm_weights
from balancers.gramian import gram_matrix
from balancers.options import GradientOptions
from balancers.signal_gram import Products, SignalGram, products_of

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


def estimator(decay, **options):
    return SignalGram(K, GradientOptions(gram="split", gram_decay=decay, **options))


def products(first, second):
    return Products(gram_matrix((first + second) / 2), gram_matrix(first, second))


def averaged(mu, ratio, refreshes, seed, decay=0.9, **options):
    """The estimator after some refreshes, and the last refresh's own Gram matrix."""
    draw, found = torch.Generator().manual_seed(seed), estimator(decay, **options)
    for _ in range(refreshes):
        last = products(*halves(mu, ratio, draw))
        found.update(last)
    return found, last.own


def test_products_of_halves_are_unbiased_and_own_products_are_not():
    mu = means(0)
    found, _ = averaged(mu, 0.3, 2000, seed=1, decay=1 - 1e-9)
    scale = mu.norm(dim=1).outer(mu.norm(dim=1))
    error = found.variance.sqrt()
    apart = ~torch.eye(K, dtype=torch.bool)
    assert ((found.split.mean - mu @ mu.T).abs() < 4.5 * error)[apart].all()
    assert (((found.own.mean - mu @ mu.T) / scale)[apart] > 4).all()  # the shared noise, 1 / 0.3^2 / 2 = 5.6


def test_the_error_falls_as_one_over_the_root_of_refreshes():
    mu, refreshes = means(0), [10, 30, 100, 300, 1000]
    scale = mu.norm(dim=1).outer(mu.norm(dim=1))
    errors = []
    for n in refreshes:
        found = [averaged(mu, 0.3, n, seed, decay=1 - 1e-9)[0].split.mean for seed in range(4)]
        errors.append(float(torch.stack([((signal - mu @ mu.T) / scale).square().mean() for signal in found]).mean().sqrt()))
    x, y = torch.tensor(refreshes).log(), torch.tensor(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-0.5, abs=0.1)


def unit_weights(grams):
    """The min-norm weights of unit gradients, for gradients of any length."""
    lengths = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    return min_norm_weights(grams / lengths[..., None] / lengths[..., None, :]) / lengths


def worst_cosines(grams, mu):
    """The least cosine of each update with a signal, one update and its signals for each Gram matrix."""
    updates = unit_weights(torch.stack(grams))[:, None] @ mu
    return torch.cosine_similarity(mu, updates, dim=-1).amin(1)


@pytest.mark.integration
@pytest.mark.parametrize("ratio", [1.0, *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (0.3, 0.1))])
def test_the_worst_true_cosine_is_no_smaller_than_with_the_own_gram(ratio):
    """The mean over 200 trials of 60 refreshes, each with other signals, of the direction that is solved at the end."""
    mu = torch.stack([means(seed) for seed in range(200)])
    trials = [averaged(signals, ratio, 60, seed) for seed, signals in enumerate(mu)]
    own, own_averaged, split = (
        float(worst_cosines(grams, mu).mean())
        for grams in (
            [last for _, last in trials],
            [found.own.mean for found, _ in trials],
            [found.estimate() for found, _ in trials],
        )
    )
    print(f"signal to noise {ratio}: own, own averaged, split {own:+.3f}, {own_averaged:+.3f}, {split:+.3f}")
    assert split - own > (0.0 if ratio == 1.0 else -0.02)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_without_a_signal_the_estimate_is_near_the_own_gram(shared):
    """However much of the noise the rewards share."""
    shrinkage = []
    for seed in range(40):
        draw, found = torch.Generator().manual_seed(seed), estimator(0.9)
        for _ in range(60):
            common, own = torch.randn(2, 1, P, generator=draw), torch.randn(2, K, P, generator=draw)
            found.update(products(*(shared**0.5 * common + (1 - shared) ** 0.5 * own).double()))
        shrinkage.append(found.shrinkage)
    assert sum(shrinkage) / 40 > 0.8


@pytest.mark.parametrize("dimension", [20, 60])
def test_split_cosines_without_a_signal_lean_below_zero(dimension):
    """By the norms, which hold the same noise, and more for weights that were found on it; the products do not lean."""
    first, second = torch.randn(2, 4000, K, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (first + second) / 2
    own, across = mean @ mean.mT, first @ second.mT
    split, solved = (across + across.mT) / 2, unit_weights(own)
    found = {}
    for kind, weights in {"fixed": torch.ones_like(solved) / K, "reused": solved.roll(1, 0), "just solved": solved}.items():
        lengths = (weights[:, None] @ mean)[:, 0].norm(dim=1, keepdim=True) * mean.norm(dim=2)
        inner = (split @ weights[..., None])[..., 0]
        by_figure = [figure.mean(1) for figure in (inner / lengths, inner / lengths.mean(0))]
        found[kind] = [(float(values.mean()), float(values.std() / 4000**0.5)) for values in by_figure]
        (cosine, error), (product, error_of_product) = found[kind]
        print(f"{dimension}, {kind}: cosine {cosine:+.4f} ± {error:.4f}, product {product:+.4f} ± {error_of_product:.4f}")
        assert cosine < -3 * error
        assert kind == "just solved" or abs(product) < 3 * error_of_product
    assert found["just solved"][0][0] < 1.5 * found["reused"][0][0]


def test_a_single_refresh_tells_no_noise():
    mu, found = means(0), estimator(0.9)
    found.update(products(*halves(mu, 1.0, torch.Generator().manual_seed(0))))
    assert found.shrinkage == 1
    torch.testing.assert_close(found.estimate(), found.own.mean)


def test_the_estimate_is_positive_semi_definite_and_no_signal_is_shorter_than_the_floor():
    for seed in range(20):
        found, _ = averaged(means(seed), 0.05, 5, seed, gram_shrinkage=False)
        gram = found.estimate()
        assert found.shrinkage == 0
        assert (found.split.mean.diagonal() < 0).any() or seed  # without a floor some lengths would be imaginary
        assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-9 * float(gram.trace())
        assert (gram.diagonal() >= 0.15**2 * found.own.mean.diagonal() * (1 - 1e-9)).all()


def test_an_exact_signal_is_returned_as_it_is():
    mu = means(0)
    found = estimator(0.9)
    for _ in range(2):
        found.update(Products(mu @ mu.T, mu @ mu.T))
    assert found.shrinkage == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(found.estimate(), mu @ mu.T)


def test_own_products_are_averaged_too():
    found = SignalGram(K, GradientOptions(gram_decay=0.5))
    first, second = (mu @ mu.T for mu in (means(0), means(1)))
    for gram in (first, second):
        found.update(Products(gram, torch.full_like(gram, torch.nan)))
    torch.testing.assert_close(found.estimate(), (first / 2 + second) / 1.5)
    last = SignalGram(K, GradientOptions())
    for gram in (first, second):
        last.update(Products(gram, torch.full_like(gram, torch.nan)))
        assert torch.equal(last.estimate(), gram)  # the paper: bit for bit those of this refresh


def test_a_reward_absent_from_a_half_keeps_its_estimate():
    mu, draw = means(0), torch.Generator().manual_seed(0)
    found, _ = averaged(mu, 1.0, 5, seed=0)
    before = found.state_dict()["split"]
    first, second = halves(mu, 1.0, draw)
    second[2] = torch.nan
    found.update(products(first, second))
    for name, values in before.items():
        changed = found.state_dict()["split"][name] != values
        assert not changed[2].any() and not changed[:, 2].any() and changed[0, 1], name


def test_products_that_were_never_estimated_are_the_gradients_own():
    mu, draw, found = means(0), torch.Generator().manual_seed(0), estimator(0.9)
    for _ in range(3):
        first, second = halves(mu, 1.0, draw)
        whole = (first + second) / 2
        second[4] = torch.nan
        found.update(Products(gram_matrix(whole), gram_matrix(first, second)))
    gram, own = found.estimate(), found.own.mean
    torch.testing.assert_close(gram[4, 4], own[4, 4])
    assert gram.isfinite().all() and not torch.allclose(gram[:4, :4], own[:4, :4])


def test_averaged_own_products_of_a_reward_that_comes_and_goes():
    """Pairs are averaged over different refreshes, so the mean need not be positive semi-definite."""
    found = SignalGram(3, GradientOptions(gram_decay=0.9))
    missing = torch.full((3, 3), torch.nan).double()
    for gradients, active in (([1.0, 1, 1], [True] * 3), ([1.0, -1, 1], [True, True, False])):
        column = torch.tensor(gradients).double()[:, None]
        found.update(Products(column @ column.T, missing).where(torch.tensor(active)))
    assert float(torch.linalg.eigvalsh(found.own.mean)[0]) < -0.1
    assert float(torch.linalg.eigvalsh(found.estimate())[0]) > -1e-9
    unit_weights(found.estimate())


def test_scale_of_a_gradient_does_not_matter():
    mu, scale = means(0), torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0], dtype=torch.float64)
    plain, scaled = estimator(0.9), estimator(0.9)
    for seed in range(5):
        first, second = halves(mu, 0.3, torch.Generator().manual_seed(seed))
        for found, factor in ((plain, torch.ones(K, 1)), (scaled, scale[:, None])):
            found.update(products(first * factor, second * factor))
    assert plain.shrinkage == pytest.approx(scaled.shrinkage)
    torch.testing.assert_close(plain.estimate() * scale.outer(scale), scaled.estimate())


def test_products_of_parts_of_unequal_size():
    """Each half is normalised by its own samples: the parts add up to the gradient, and rows of samples give the halves."""
    samples = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0))
    applies = torch.rand(12, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    in_first = torch.arange(12) < 4
    shares = (applies / applies.sum(0))[:, :, None] * samples
    parts = torch.stack([shares[in_first].sum(0), shares[~in_first].sum(0)])
    counts = torch.stack([applies[in_first].sum(0), applies[~in_first].sum(0)]).float()
    found = products_of(parts, 7.0 * counts)  # up to a factor

    def mean(half):
        return (applies[half][:, :, None] * samples[half]).sum(0) / applies[half].sum(0)[:, None]

    torch.testing.assert_close(found.own, gram_matrix(shares.sum(0)))
    torch.testing.assert_close(found.cross, gram_matrix(mean(in_first), mean(~in_first)))
    counts[1, 0] = parts[1, 0] = 0
    absent = products_of(parts, counts)
    assert absent.split[0].isnan().all() and absent.split[:, 0].isnan().all() and absent.split[1:, 1:].isfinite().all()
    assert absent.own.isfinite().all()
