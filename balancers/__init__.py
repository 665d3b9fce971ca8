"""Ways of merging several rewards into one update.

Rewards can be merged at three levels: the rewards themselves, before advantages exist; the per-reward advantages; or
the gradients of the per-reward losses. A `Balancer` is a Lightning callback that does one of these. It decides on
which optimizer steps per-reward gradients are worth their price, turns their inner products into weights, and
remembers those weights for the cheaper steps in between, where they multiply the losses. It knows nothing of
diffusion, images or what a reward measures: only rows of a matrix and their names. A new method is one file that
overrides one method.
"""

from balancers.advantage_sum import AdvantageSum
from balancers.base import CADENCE, Balancer
from balancers.cagrad import CAGrad
from balancers.fixed_weights import FixedWeights
from balancers.gramian import cosines
from balancers.marble import MARBLE
from balancers.mgda import MGDA
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
