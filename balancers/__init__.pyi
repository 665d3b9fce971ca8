from .advantage_sum import AdvantageSum as AdvantageSum
from .base import Balancer as Balancer
from .cagrad import CAGrad as CAGrad
from .fixed_weights import FixedWeights as FixedWeights
from .gem import GEM as GEM
from .gramian import cosines as cosines
from .marble import MARBLE as MARBLE
from .mgda import MGDA as MGDA
from .options import CADENCE as CADENCE
from .options import GradientOptions as GradientOptions
from .outcome_guard import OutcomeGuard as OutcomeGuard
from .pcgrad import PCGrad as PCGrad
from .qp import min_norm_weights as min_norm_weights
from .sequential import Sequential as Sequential
from .torchjd import TorchJD as TorchJD
from .weighted_sum import WeightedSum as WeightedSum

__all__ = [
    "CADENCE",
    "GEM",
    "MARBLE",
    "MGDA",
    "AdvantageSum",
    "Balancer",
    "CAGrad",
    "FixedWeights",
    "GradientOptions",
    "OutcomeGuard",
    "PCGrad",
    "Sequential",
    "TorchJD",
    "WeightedSum",
    "cosines",
    "min_norm_weights",
]
