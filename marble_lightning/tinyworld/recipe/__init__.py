"""The recipe of the bundled weights, one file per stage: vocabulary, autoencoder, base model, reward models, prompt files.

Like web data, many training images of the base model have a fault. The base model can therefore draw well but often does
not, which leaves room for reinforcement learning.
"""
