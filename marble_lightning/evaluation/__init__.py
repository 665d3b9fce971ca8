"""Evaluation on held-out prompts: sampling and scoring, statistics, tables, result files, and comparison of runs."""

from lazy_loader import attach_stub

# the names of __init__.pyi, each imported when it is first used: reading results needs no trainer
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
