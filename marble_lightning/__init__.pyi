from .data import PromptDataModule as PromptDataModule
from .evaluation import Evaluation as Evaluation
from .module import DiffusionNFT as DiffusionNFT
from .nft import Objective as Objective
from .nft import Sampling as Sampling
from .policies import Averaging as Averaging
from .policies import FlowPolicy as FlowPolicy
from .policies import SD3Policy as SD3Policy
from .policies import ShardedBaseStrategy as ShardedBaseStrategy
from .policies import ZImagePolicy as ZImagePolicy
from .scoring import Scoring as Scoring

__all__ = [
    "Averaging",
    "DiffusionNFT",
    "Evaluation",
    "FlowPolicy",
    "Objective",
    "PromptDataModule",
    "SD3Policy",
    "Sampling",
    "Scoring",
    "ShardedBaseStrategy",
    "ZImagePolicy",
]
