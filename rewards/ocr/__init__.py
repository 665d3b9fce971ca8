"""OCR: whether the image says what the prompt quotes."""
