"""The spread of each reward among the images of a prompt, summed over rounds."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def squared_deviations(
    scores: Float[Tensor, "sample reward"], prompts: Int[Tensor, " sample"]
) -> Float[Tensor, "total reward"]:
    r"""Sum over samples of $(R_{ik} - \operatorname{mean}_{j \sim i} R_{jk})^2$, and the number of samples, of each reward.

    The mean is that of the prompt's samples; scores that are not finite do not count. Totals of several rounds add up.
    A deviation within the rounding error of float32 is 0.

    Shape:
        scores (N, K), prompts (N,), indices from 0 -> (2, K), float64 on the CPU.

    >>> squared_deviations(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1])).flatten().tolist()
    [2.0, 3.0]
    """
    scores, prompts = scores.cpu().double(), prompts.cpu()
    scored = scores.isfinite()
    values, zeros = torch.where(scored, scores, 0.0), scores.new_zeros(int(prompts.max()) + 1, scores.shape[1])
    numbers = zeros.index_add(0, prompts, scored.double())
    means = (zeros.index_add(0, prompts, values) / numbers.clamp(min=1))[prompts]
    deviations = torch.where(scored, values - means, 0.0)
    deviations[deviations.abs() <= torch.finfo(torch.float32).eps * means.abs()] = 0.0
    return torch.stack([deviations.square().sum(0), scored.double().sum(0)])


def spread(totals: Float[Tensor, "total reward"]) -> Float[Tensor, " reward"]:
    """Standard deviation of each reward within prompts from totals of `squared_deviations`; 0 where nothing was scored.

    Shape:
        totals (2, K) -> (K,).
    """
    squares, samples = totals
    return (squares / samples.clamp(min=1)).sqrt()
