"""GenEval: objects, counts, colours and positions, checked by an object detector."""

from rewards.geneval.detectors import Detection, Detector
from rewards.geneval.mask2former import Mask2Former
from rewards.geneval.reward import GenEval
from rewards.geneval.rules import Verdict

__all__ = ["Detection", "Detector", "GenEval", "Mask2Former", "Verdict"]
