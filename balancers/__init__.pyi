from .advantage_sum import AdvantageSum as AdvantageSum
from .base import Balancer as Balancer
from .cagrad import CAGrad as CAGrad
from .fixed_weights import FixedWeights as FixedWeights
from .gramian import cosines as cosines
from .marble import MARBLE as MARBLE
from .mgda import MGDA as MGDA
from .options import CADENCE as CADENCE
from .options import GradientOptions as GradientOptions
from .pcgrad import PCGrad as PCGrad
from .qp import min_norm_weights as min_norm_weights
from .torchjd import TorchJD as TorchJD
from .weighted_sum import WeightedSum as WeightedSum

__all__ = [
    "CADENCE",
    "MARBLE",
    "MGDA",
    "AdvantageSum",
    "Balancer",
    "CAGrad",
    "FixedWeights",
    "GradientOptions",
    "PCGrad",
    "TorchJD",
    "WeightedSum",
    "cosines",
    "min_norm_weights",
]
