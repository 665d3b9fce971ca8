"""OCR: whether an image shows the quoted text of its prompt."""

from rewards.ocr.reward import OCR

__all__ = ["OCR"]
