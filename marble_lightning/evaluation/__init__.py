"""Evaluation on held-out prompts: sampling and scoring, statistics, tables, result files, and comparison of runs."""

from marble_lightning.evaluation.evaluator import Evaluator
from marble_lightning.evaluation.settings import Evaluation

__all__ = ["Evaluation", "Evaluator"]
