"""Methods that merge several rewards into one update.

A method merges at one of three levels: the rewards, before advantages are computed; the per-reward advantages; or the
gradients of the per-reward losses. A `Balancer` is a Lightning callback that merges at one of these levels. It chooses
the optimizer steps on which per-reward gradients are computed, turns their inner products into weights, and keeps the
weights for the cheaper steps in between, where they multiply the losses. It does not depend on diffusion, images or
reward models: its input is a matrix and the names of its rows. A new method is one file that overrides one method.
"""

from lazy_loader import attach_stub

# the names of __init__.pyi, each imported when it is first used
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
