"""Callbacks that look at a run: progress, held-out images, results, gradient alignment, image drift, predictions."""
