"""TorchJD: agreement with the library's own results, one solution or several, and the memory in checkpoints."""

import pytest
import torch
from torchjd import aggregation

from balancers import Balancer, TorchJD
from balancers.gramian import root
from balancers.torchjd import MEMORY, PRODUCTS, build, memory_of, restore, weights_of
from tests.helpers.small_balancers import gram_of, step

NAMES = ("a", "b", "c", "d", "e")
ARGUMENTS = {"FairGrad": {"alpha": 1.0}, "CAGrad": {"c": 0.4}, "Krum": {"n_byzantine": 1}}
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")  # NashMTL's


def bound(balancer, names=NAMES):
    balancer.bind(names)
    return balancer


def gradients_of(seed, k=5):
    """Gradients of a root mean square length of 1, as the library receives them."""
    gradients = torch.randn(k, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gradients / gradients.square().sum(1).mean().sqrt()


STATELESS = ["UPGrad", "DualProj", "AlignedMTL", "IMTLG", "Mean", "PCGrad", "ConFIG", "Sum", "Random", *ARGUMENTS]


@pytest.mark.parametrize("name", STATELESS)
def test_aggregators(name):
    balancer = bound(TorchJD(aggregator=name, arguments=ARGUMENTS.get(name)))
    gradients = gradients_of(1)
    torch.manual_seed(0)
    expected = getattr(aggregation, name)(**ARGUMENTS.get(name, {}))(gradients)
    torch.testing.assert_close(balancer.weights(gradients @ gradients.T) @ gradients, expected, rtol=1e-4, atol=1e-5)
    assert balancer.memory == {}


def test_every_aggregator_is_known_or_refused():
    """A new version of TorchJD may bring aggregators that keep something which `MEMORY` does not name."""
    stateful = {name for name in aggregation.__all__ if hasattr(getattr(aggregation, name), "reset")}
    expected = {"GradVac", "NashMTL", "MoDoWeighting", "SDMGradWeighting", "GradVacWeighting"}
    refused = {"ExcessMTL", "ExcessMTLWeighting", "PCD", "PCDWeighting", "CRMOGMWeighting"}
    assert stateful == expected | refused


@pytest.mark.parametrize("name", MEMORY)
def test_several_solutions_equal_those_of_one_aggregator(name):
    balancer, whole = bound(TorchJD(aggregator=name)), build(name, {}, 5)
    for balancer.step in range(4):
        gradients = gradients_of(balancer.step)
        gram = gradients @ gradients.T
        torch.manual_seed(balancer.step)
        expected = whole(gram) @ gradients if name in PRODUCTS else whole(gradients)
        torch.testing.assert_close(balancer.weights(gram) @ gradients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_matters(name):
    """Without it the second solution differs; NashMTL's starts its iterations elsewhere."""
    arguments = {"lr": 0.1} if name == "SDMGrad" else {}  # its default of 10 ends at the same vertex from everywhere
    balancer, grams = bound(TorchJD(aggregator=name, arguments=arguments)), [gram_of(seed, push=0.8) for seed in range(2)]
    second = [balancer.weights(gram) for gram in grams][1]
    assert not torch.equal(bound(TorchJD(aggregator=name, arguments=arguments)).weights(grams[1]), second)


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_survives_a_resume_bit_for_bit(tmp_path, name, bind_first):
    whole = bound(TorchJD(aggregator=name))
    for seed in range(3):
        step(whole, gradients_of(seed).float())
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = TorchJD(aggregator=name)
    if bind_first:
        resumed.bind(NAMES)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.bind(NAMES)
    for seed in range(3, 6):
        first, second = (step(balancer, gradients_of(seed).float())[0] for balancer in (whole, resumed))
        assert torch.equal(first, second)


def test_a_resume_with_another_aggregator_starts_without_memory():
    first, second, gram = bound(TorchJD(aggregator="GradVac")), bound(TorchJD(aggregator="MoDo")), gram_of(0)
    first.weights(gram)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weights(gram), bound(TorchJD(aggregator="MoDo")).weights(gram))


def test_each_set_of_active_rewards_has_its_own_memory():
    balancer, alone = bound(TorchJD(aggregator="GradVac")), bound(TorchJD(aggregator="GradVac"))
    gram = gram_of(0, push=0.8)
    balancer.weights(gram)
    balancer.active = torch.tensor([True, True, False, True, True])
    balancer.weights(gram[balancer.active][:, balancer.active])
    balancer.active[:] = True
    assert set(balancer.memory) == {"GradVac of a, b, c, d, e", "GradVac of a, b, d, e"}
    alone.weights(gram)
    torch.testing.assert_close(balancer.weights(gram), alone.weights(gram))


def test_a_state_dict_does_not_share_the_memory():
    balancer = bound(TorchJD(aggregator="GradVac"))
    balancer.weights(gram_of(0))
    state = balancer.state_dict()["memory"]
    before = {key: {path: value.clone() for path, value in memory.items()} for key, memory in state.items()}
    balancer.weights(gram_of(1))
    assert all(torch.equal(state[key][path], value) for key, memory in before.items() for path, value in memory.items())


def test_memory_of_a_restored_aggregator():
    for name in MEMORY:
        first, second = build(name, {}, 5), build(name, {}, 5)
        weights_of(first, name, gram_of(3))
        memory = memory_of(first, name)
        restore(second, name, memory, 5)
        restored = memory_of(second, name)
        assert all(torch.equal(torch.as_tensor(restored[path]), torch.as_tensor(memory[path])) for path in memory)


def test_refused_aggregators():
    with pytest.raises(ValueError, match=r"`aggregator` must be one of .*MoDo.*UPGrad.*Found 'Typo'\."):
        TorchJD(aggregator="Typo")
    with pytest.raises(ValueError, match=r"Found 'PCD', but .* use `balancers.GEM`"):
        TorchJD(aggregator="PCD")
    for name in ("ExcessMTL", "CRMOGM", "GradDrop", "TrimmedMean", "WeightedAggregator"):
        with pytest.raises(ValueError, match=rf"`aggregator` must be one of .* Found '{name}'"):
            TorchJD(aggregator=name)
    with pytest.raises(TypeError):
        TorchJD(aggregator="UPGrad", arguments={"typo": 1})


def test_root_keeps_the_inner_products():
    gram = gram_of(2, k=5, p=3)  # of rank 3
    torch.testing.assert_close(root(gram) @ root(gram).T, gram)


class OfTorchJD(Balancer):
    """A weighting of the TorchJD library as a balancer."""

    def weights(self, gram):
        return aggregation.UPGradWeighting()(gram)


def test_a_weighting_of_torchjd_is_a_balancer_in_one_line():
    gram = gram_of(0, push=1.0)
    torch.testing.assert_close(bound(OfTorchJD()).weights(gram), bound(TorchJD()).weights(gram), rtol=1e-4, atol=1e-6)
