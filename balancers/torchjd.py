"""TorchJD's aggregators that weight gradients, applied to inner products."""

import inspect
from copy import deepcopy
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.gramian import root

MEMORY = {
    "GradVac": ("gramian_weighting._phi_t",),
    "NashMTL": ("weighting.prvs_alpha", "weighting.step"),
    "MoDo": ("_lambda",),
    "SDMGrad": ("_w",),
}
"""Attributes of aggregators, and of weightings without one, that the next result depends on."""

PRODUCTS = ("MoDo", "SDMGrad")
"""Weightings of the inner products of two batches; TorchJD has no aggregators of them."""

REFUSED = {
    "ExcessMTL": "it uses squares of single coordinates, which inner products do not contain",
    "PCD": "its first gradient is that of the primary reward, which may be inactive; use `balancers.GEM`",
    "CRMOGM": "it smooths the weights of another method; use `ema_decay`",
}
"""Names that are refused, with the reason; so are aggregators that do not weight gradients."""


class TorchJD(Balancer):
    """Weight the gradients as an aggregator of the TorchJD library does.

    The aggregator is built again for every solution, since rewards may become inactive and active again. What GradVac,
    NashMTL, MoDo and SDMGrad keep from earlier solutions is stored, in checkpoints too, separately for each set of active
    rewards. Their papers give MoDo and SDMGrad the inner products of two independent batches; only `gram: split` estimates
    these, otherwise both batches are the same.

    Gradients are first rescaled to a root mean square length of 1: below 0.01, UPGrad and DualProj treat them as zero and
    return the plain mean, and NashMTL returns nothing. The update has the same length as in TorchJD, where PCGrad, GradVac
    and Sum add up K gradients and most other aggregators average them.

    Args:
        aggregator: Name of a class in `torchjd.aggregation`, such as UPGrad, DualProj, AlignedMTL, IMTLG, NashMTL, FairGrad,
            GradVac, ConFIG; MoDo and SDMGrad for the weightings of that name.
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
        aggregator = build(self.aggregator, self.arguments, len(gram))
        rewards = ", ".join(compress(self.names, self.active.tolist())) if self.names else "any"
        key = f"{self.aggregator} of {rewards}"  # a run that resumes with another aggregator must not use its memory
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if key in self.memory:
                restore(aggregator, self.aggregator, self.memory[key], len(gram))
            torch.manual_seed(1_000_003 * self.seed + self.step)
            alpha = weights_of(aggregator, self.aggregator, unit).to(gram)
        if self.aggregator in MEMORY:
            self.memory[key] = memory_of(aggregator, self.aggregator)
        return alpha


def weights_of(aggregator: Any, name: str, gram: Float[Tensor, "reward reward"]) -> Float[Tensor, " reward"]:
    """Weights of the gradients in the aggregator's result.

    Shape:
        gram (K, K) -> (K,).
    """
    rows = root(gram)
    if name in PRODUCTS:
        return aggregator(gram)
    if name == "ConFIG":  # its result is a combination of the rows
        return torch.linalg.lstsq(rows.T, aggregator(rows)[:, None], driver="gelsd").solution[:, 0]
    return aggregator.weighting(rows)


def memory_of(aggregator: Any, name: str) -> dict[str, Any]:
    """The attributes in `MEMORY`, as copies in tensors or numbers, which checkpoints can hold."""
    found = {}
    for path in MEMORY[name]:
        value = _attribute(aggregator, path)
        found[path] = value if isinstance(value, int | float) else torch.as_tensor(value).clone()
    return found


def restore(aggregator: Any, name: str, memory: dict[str, Any], n_rewards: int) -> None:
    """Give a new aggregator the memory of an earlier one."""
    weights_of(aggregator, name, torch.eye(n_rewards, dtype=torch.float64))  # it sets up its state at its first call
    for path, value in deepcopy(memory).items():
        owner, _, attribute = path.rpartition(".")
        as_array = isinstance(value, Tensor) and not isinstance(_attribute(aggregator, path), Tensor)
        setattr(_attribute(aggregator, owner), attribute, value.numpy() if as_array else value)


def _attribute(value: Any, path: str) -> Any:
    """An attribute of attributes, such as `weighting.step`; the value itself for an empty path."""
    for name in filter(None, path.split(".")):
        value = getattr(value, name)
    return value


def build(name: str, arguments: dict[str, Any], n_rewards: int) -> Any:
    """Build an aggregator of TorchJD, or a weighting named in `PRODUCTS`.

    Raises:
        ImportError: TorchJD, or a package that the aggregator needs, is not installed.
        ValueError: There is no such aggregator, or inner products do not determine its result.
        TypeError: It does not take those arguments.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError("The TorchJD balancer needs TorchJD: pip install 'marble-lightning[torchjd]'.") from error

    def usable(value: Any) -> bool:
        return inspect.isclass(value) and issubclass(value, aggregation.WeightedAggregator) and not inspect.isabstract(value)

    known = {key for key, value in vars(aggregation).items() if usable(value)} | {"ConFIG", *PRODUCTS}
    known -= {"WeightedAggregator", "GramianWeightedAggregator", *REFUSED}
    if name not in known:
        reason = f", but {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(f"`aggregator` must be one of {', '.join(sorted(known))}. Found {name!r}{reason}.")
    kind = getattr(aggregation, f"{name}Weighting" if name in PRODUCTS else name)
    sized = {"n_tasks": n_rewards} if "n_tasks" in inspect.signature(kind).parameters else {}
    return kind(**sized, **arguments)
