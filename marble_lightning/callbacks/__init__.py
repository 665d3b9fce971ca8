"""Callbacks of the command line: progress, held-out images, results, gradient alignment, image drift, predictions."""

from marble_lightning.callbacks.gradient_alignment import Harmony
from marble_lightning.callbacks.held_out_images import Pictures
from marble_lightning.callbacks.image_drift import Alarms
from marble_lightning.callbacks.prediction_writer import PictureWriter
from marble_lightning.callbacks.progress_bar import ProgressBar
from marble_lightning.callbacks.results_writer import Results

__all__ = ["Alarms", "Harmony", "PictureWriter", "Pictures", "ProgressBar", "Results"]
