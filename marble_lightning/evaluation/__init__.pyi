from .evaluator import Evaluator as Evaluator
from .settings import Evaluation as Evaluation

__all__ = ["Evaluation", "Evaluator"]
