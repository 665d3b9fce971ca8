from .base import Prompt as Prompt
from .base import Reward as Reward
from .clip import Aesthetic as Aesthetic
from .clip import CLIPScore as CLIPScore
from .clip import HPSv2 as HPSv2
from .clip import PickScore as PickScore
from .geneval import Detection as Detection
from .geneval import Detector as Detector
from .geneval import GenEval as GenEval
from .geneval import Mask2Former as Mask2Former
from .geneval import Verdict as Verdict
from .hpsv3 import HPSv3 as HPSv3
from .imagereward import ImageReward as ImageReward
from .jpeg import JPEGCompressibility as JPEGCompressibility
from .ocr import OCR as OCR
from .remote import GenEval2 as GenEval2
from .remote import RemoteReward as RemoteReward
from .remote import UnifiedReward as UnifiedReward
from .remote import UnifiedReward2 as UnifiedReward2
from .remote import VisionLanguageReward as VisionLanguageReward

__all__ = [
    "OCR",
    "Aesthetic",
    "CLIPScore",
    "Detection",
    "Detector",
    "GenEval",
    "GenEval2",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "JPEGCompressibility",
    "Mask2Former",
    "PickScore",
    "Prompt",
    "RemoteReward",
    "Reward",
    "UnifiedReward",
    "UnifiedReward2",
    "Verdict",
    "VisionLanguageReward",
]
