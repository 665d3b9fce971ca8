"""The sum of per-reward gradients over the micro-batches of one refresh step."""

import torch
from jaxtyping import Float
from torch import Tensor


class GradientSum:
    """Sums the gradients of the first `wanted` micro-batches in float32.

    Args:
        wanted: Micro-batches to add, >= 0.
    """

    def __init__(self, wanted: int = 0) -> None:
        self.wanted, self.received = wanted, 0
        self.total: Tensor | None = None

    @property
    def incomplete(self) -> bool:
        """Whether micro-batches are still missing."""
        return self.received < self.wanted

    def add(self, gradients: Float[Tensor, "reward parameter"], n_rewards: int) -> None:
        """Add one micro-batch's gradients.

        Raises:
            RuntimeError: The sum is complete.
            ValueError: There are not `n_rewards` rows.
        """
        if not self.incomplete:
            raise RuntimeError("`add_gradients` must be called while `wants_gradients` is true. Found false.")
        if gradients.ndim != 2 or len(gradients) != n_rewards:
            raise ValueError(f"`gradients` must have shape ({n_rewards}, P). Found {tuple(gradients.shape)}.")
        if self.total is None:
            self.total = gradients.detach().to(torch.float32, copy=True)
        else:
            self.total += gradients.detach()
        self.received += 1

    def take(self) -> Float[Tensor, "reward parameter"]:
        """Return the sum and free it.

        Raises:
            RuntimeError: Micro-batches are missing, or the sum was taken before.
        """
        if self.total is None or self.incomplete:
            raise RuntimeError(
                f"`solve` must follow {self.wanted} `add_gradients` of a refresh step, once. Found {self.received}."
            )
        total, self.total = self.total, None
        return total
