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
        self.samples: Float[Tensor, "half reward"] | None = None
        """Number of samples of each half that each reward applies to, up to a factor; None without halves."""

    @property
    def incomplete(self) -> bool:
        """Whether micro-batches are still missing."""
        return self.received < self.wanted

    def add(self, gradients: Tensor, samples: Tensor | None, n_rewards: int) -> None:
        """Add one micro-batch's gradients, see `Balancer.add_gradients`.

        Raises:
            RuntimeError: The sum is complete.
            ValueError: There are not `n_rewards` rows, or the micro-batches of a step differ in `samples`.
        """
        if not self.incomplete:
            raise RuntimeError("`add_gradients` must be called while `wants_gradients` is true. Found false.")
        leading = (n_rewards,) if samples is None else (2, n_rewards)
        if gradients.ndim != len(leading) + 1 or gradients.shape[:-1] != leading:
            sizes = ", ".join(map(str, leading))
            raise ValueError(f"`gradients` must have shape ({sizes}, P). Found {tuple(gradients.shape)}.")
        if self.total is not None and (samples is None) != (self.samples is None):
            raise ValueError("All micro-batches of a step must have `samples`, or none. Found both.")
        if self.total is None:
            self.total = gradients.detach().to(torch.float32, copy=True)
            self.samples = None if samples is None else samples.detach().clone()
        else:
            self.total += gradients.detach()
            if samples is not None and self.samples is not None:
                self.samples += samples
        self.received += 1

    def take(self) -> Tensor:
        """Return the sum and free it; `samples` stay.

        Raises:
            RuntimeError: Micro-batches are missing, or the sum was taken before.
        """
        if self.total is None or self.incomplete:
            raise RuntimeError(
                f"`solve` must follow {self.wanted} `add_gradients` of a refresh step, once. Found {self.received}."
            )
        total, self.total = self.total, None
        return total
