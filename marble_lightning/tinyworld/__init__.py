"""The tiny world for laptops: a small but real Stable Diffusion 3, its training scenes, and reward models for its images.

Scenes are coloured shapes, or a sign with a word, drawn in code at 64 x 64 pixels (`scenes`), with captions in the style
of the published prompt sets (`captions`) and ten kinds of faults (`degradations`). `train` makes the bundled weights from
them: an SD3 pipeline in diffusers format, three CLIP reward models in transformers format and an aesthetic head.
`ColourBlobs` is GenEval's object detector here. The rest of the project handles this model exactly like the large one.
"""

from pathlib import Path

from marble_lightning.tinyworld.detector import ColourBlobs

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the bundled weights."""
PROMPTS = Path(__file__).parent / "prompts"
"""Folder of the bundled prompt files."""

__all__ = ["PROMPTS", "WEIGHTS", "ColourBlobs"]
