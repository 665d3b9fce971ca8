"""Prompts: the data module and the files it reads."""
