"""Prompts: the data module that draws the prompts of each round, and the files that it reads."""

from marble_lightning.data.datamodule import PromptDataModule

__all__ = ["PromptDataModule"]
