"""Callbacks of the command line: progress, held-out images, results, gradient alignment, image drift, predictions."""

from marble_lightning.callbacks.gradient_alignment import GradientAlignment
from marble_lightning.callbacks.held_out_images import HeldOutImages
from marble_lightning.callbacks.image_drift import ImageDriftMonitor
from marble_lightning.callbacks.prediction_writer import PredictionWriter
from marble_lightning.callbacks.progress_bar import ProgressBar
from marble_lightning.callbacks.results_writer import Results

__all__ = ["GradientAlignment", "HeldOutImages", "ImageDriftMonitor", "PredictionWriter", "ProgressBar", "Results"]
