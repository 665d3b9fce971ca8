"""Rewards on CLIP models."""
