"""HPSv3: a Qwen2-VL model with a regression head."""

from rewards.hpsv3.reward import HPSv3

__all__ = ["HPSv3"]
