"""Held-out prompts: scores, their statistics, tables and results."""
