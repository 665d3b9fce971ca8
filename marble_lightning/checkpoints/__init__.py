"""Checkpoints of rounds: what they hold, when they are written, and how a run that was stopped resumes."""
