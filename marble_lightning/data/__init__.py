"""Prompts: the data module that draws each round's, and the files it reads."""

from marble_lightning.data.datamodule import PromptDataModule

__all__ = ["PromptDataModule"]
