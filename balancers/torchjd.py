"""TorchJD's aggregators that weight gradients, applied to inner products."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer


class TorchJD(Balancer):
    """Weight the gradients as an aggregator of the TorchJD library does.

    The aggregator is built again for every solution, since rewards may become inactive and active again; the only state is
    the smoothing of `ema_decay`. So aggregators whose state changes their result are refused.

    Gradients are first rescaled to a root mean square length of 1: below 0.01, UPGrad and DualProj treat them as zero and
    return the plain mean, and NashMTL returns nothing. The update has the same length as in TorchJD, where PCGrad and Sum
    add up K gradients and most other aggregators average them.

    Args:
        aggregator: Name of a class in `torchjd.aggregation`, such as UPGrad, DualProj, AlignedMTL, IMTLG, NashMTL.
        arguments: Arguments of its constructor. Null: its defaults. `n_tasks` is filled in.
        seed: Seed of aggregators that draw, which also depends on the optimizer step; the same on every rank.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, and the papers TorchJD names.
    """

    def __init__(
        self, *, aggregator: str = "UPGrad", arguments: dict[str, Any] | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.aggregator, self.arguments, self.seed = aggregator, dict(arguments or {}), seed
        build(aggregator, self.arguments, 2)  # a wrong name or argument fails here

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        unit = gram / gram.diagonal().mean()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1_000_003 * self.seed + self.step)
            return build(self.aggregator, self.arguments, len(gram)).weighting(root(unit)).to(gram)


def root(gram: Float[Tensor, "reward reward"]) -> Float[Tensor, "reward reward"]:
    r"""A matrix $R$ with $R R^\top = G$, whose rows have the same inner products as the gradients.

    >>> root(torch.diag(torch.tensor([1.0, 4.0]))).square().sum(1)
    tensor([1., 4.])
    """
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


WARM_STARTED = ("NashMTL",)
"""Aggregators that are allowed although they have state: it only saves time."""


def build(name: str, arguments: dict[str, Any], n_rewards: int) -> Any:
    """Build an aggregator of TorchJD.

    Raises:
        ImportError: TorchJD, or a package that the aggregator needs, is not installed.
        ValueError: There is no such aggregator, or its state changes its result.
        TypeError: It does not take those arguments.
    """
    try:
        import torchjd
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError("The TorchJD balancer needs TorchJD: pip install 'marble-lightning[torchjd]'.") from error

    def usable(value: Any) -> bool:
        weighs = inspect.isclass(value) and issubclass(value, aggregation.WeightedAggregator)
        return weighs and not inspect.isabstract(value) and not issubclass(value, torchjd.Stateful)

    known = {key for key, value in vars(aggregation).items() if usable(value)} - {"WeightedAggregator"}
    known |= set(WARM_STARTED)
    known -= {"GramianWeightedAggregator"}
    if name not in known:
        raise ValueError(f"`aggregator` must be one of {', '.join(sorted(known))}. Found {name!r}.")
    kind = getattr(aggregation, name)
    sized = {"n_tasks": n_rewards} if "n_tasks" in inspect.signature(kind).parameters else {}
    return kind(**sized, **arguments)
