"""Online reinforcement learning of Stable Diffusion 3 on several rewards at once.

A `DiffusionNFT` module wraps an `SD3Policy` (the stock pipeline, a frozen base, three LoRA adapters) and a dictionary of
rewards. One epoch is one round: the prompts of a `PromptDataModule` are sampled with the old adapter, scored, turned into
advantages, and trained on. A callback from `balancers` merges the rewards. `Sampling`, `Objective`, `Averaging`, `Scoring`
and `Evaluation` are groups of settings; `tinyworld` has small models and data that run on a laptop.
"""

import logging

from lazy_loader import attach_stub

from marble_lightning import _shadowing as _shadowing  # it checks what later imports find

# diffusers imports image processors, which no pipeline here uses; without torchvision, transformers warns about each
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

# the names of __init__.pyi, each imported when it is first used
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
