"""OCR: whether the image shows the text that its prompt quotes."""

from rewards.ocr.reward import OCR

__all__ = ["OCR"]
