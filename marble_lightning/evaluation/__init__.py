"""Held-out prompts: how they are sampled and scored, statistics, tables, results as files, and runs side by side."""

from marble_lightning.evaluation.evaluator import Evaluator
from marble_lightning.evaluation.settings import Evaluation

__all__ = ["Evaluation", "Evaluator"]
