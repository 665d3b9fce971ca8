"""Scoring of images: each reward on its device, in a thread during sampling, with retries and a time limit."""

from marble_lightning.scoring.failures import RewardError
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring

__all__ = ["RewardError", "Scorer", "Scoring"]
