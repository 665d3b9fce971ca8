"""Rewards based on CLIP models: PickScore, HPSv2, CLIPScore and the LAION aesthetic score."""

from rewards.clip.aesthetic import Aesthetic
from rewards.clip.clipscore import CLIPScore
from rewards.clip.hpsv2 import HPSv2
from rewards.clip.pickscore import PickScore

__all__ = ["Aesthetic", "CLIPScore", "HPSv2", "PickScore"]
