"""The recipe of the bundled weights, a stage a file: words, autoencoder, base model, reward models, prompt files.

The base is trained as web data would have it: many of its images have a fault, so that it can draw well but often
does not. That is what reinforcement learning is for.
"""
