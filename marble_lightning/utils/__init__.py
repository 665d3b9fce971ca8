"""Shared helpers: checks of settings, seeds, atomic files, images, loggers, processes."""
