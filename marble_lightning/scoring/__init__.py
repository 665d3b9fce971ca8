"""Rewards at work: on their devices, in threads, with retries."""
