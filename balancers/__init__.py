"""Methods that merge several rewards into one update.

A method merges at one of three levels: the rewards, before advantages are computed; the per-reward advantages; or the
gradients of the per-reward losses. A `Balancer` is a Lightning callback that merges at one of these levels. It chooses
the optimizer steps on which per-reward gradients are computed, turns their inner products into weights, and keeps the
weights for the cheaper steps in between, where they multiply the losses. It does not depend on diffusion, images or
reward models: its input is a matrix and the names of its rows. A new method is one file that overrides one method.
"""

from balancers.advantage_sum import AdvantageSum
from balancers.base import Balancer
from balancers.cagrad import CAGrad
from balancers.fixed_weights import FixedWeights
from balancers.gramian import cosines
from balancers.marble import MARBLE
from balancers.mgda import MGDA
from balancers.options import CADENCE
from balancers.pcgrad import PCGrad
from balancers.qp import min_norm_weights
from balancers.torchjd import TorchJD
from balancers.weighted_sum import WeightedSum

__all__ = [
    "CADENCE",
    "MARBLE",
    "MGDA",
    "AdvantageSum",
    "Balancer",
    "CAGrad",
    "FixedWeights",
    "PCGrad",
    "TorchJD",
    "WeightedSum",
    "cosines",
    "min_norm_weights",
]
