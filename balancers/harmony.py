"""How well an update agrees with each reward's gradient, from inner products alone."""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**20
"""Columns widened to float64 at a time, so that a Gram matrix never doubles the memory of the gradients."""


def gram_matrix(gradients: Float[Tensor, "reward parameter"]) -> Float[Tensor, "reward reward"]:
    r"""Inner products $G_{jk} = \langle g_j, g_k \rangle$ in float64, on the CPU.

    What follows is K x K algebra, for which launching kernels would cost more than computing.

    Shape:
        gradients (K, P) -> (K, K).
    """
    # Apple's GPUs have no float64: there the products are float32, and only their sum is wide.
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for chunk in gradients.detach().split(CHUNK, dim=1):
        chunk = chunk.to(wide)
        gram += (chunk @ chunk.T).cpu()
    return gram


def cosines(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, "reward"]) -> Float[Tensor, "reward"]:
    r"""Cosine between the update $d = \sum_k c_k g_k$ and each $g_k$: $(G c)_k / (\sqrt{c^\top G c}\, \sqrt{G_{kk}})$.

    A cosine with a vector too short to tell from rounding (the update of two opposite gradients, a zero gradient) is 0.

    Shape:
        gram (K, K), coefficients (K,) -> (K,), dtype of `gram`.

    >>> cosines(torch.eye(2), torch.tensor([1.0, 1.0]))
    tensor([0.7071, 0.7071])
    """
    coefficients = coefficients.to(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    # Squares lose half the digits: what is left of an update below sqrt(eps) of its terms is rounding.
    rounding = torch.finfo(gram.dtype).eps ** 0.5 * (coefficients.abs() @ norms)
    defined = (norms > 0) & (length > rounding)
    return torch.where(defined, (gram @ coefficients) / torch.where(defined, length * norms, 1), 0).clamp(-1, 1)


def compare(gram: Float[Tensor, "reward reward"], coefficients: Float[Tensor, "reward"]) -> dict[str, float]:
    r"""Harmony of an update $\sum_k c_k g_k$ and of the plain mean $\tfrac1K \sum_k g_k$ of the same gradients.

    The paper's three figures, least, mean and (population) variance over the rewards of `cosines`, under the keys
    `update/cos_min`, `update/cos_mean`, `update/cos_var` and `mean/...`.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.

    Shape:
        gram (K, K), coefficients (K,).
    """
    return _figures(cosines(gram, coefficients), cosines(gram, torch.ones_like(coefficients)))


def agreement(
    update: Float[Tensor, "parameter"], mean: Float[Tensor, "parameter"], gradients: Float[Tensor, "reward parameter"]
) -> dict[str, float]:
    """What `compare` tells, of any update and plain mean, and gradients of any samples, not only those they come from.

    Shape:
        update (P,), mean (P,), gradients (K, P).
    """
    gram = gram_matrix(torch.cat([gradients, update[None], mean[None]]))
    ours, theirs = torch.eye(len(gram), dtype=gram.dtype)[-2:]
    return _figures(cosines(gram, ours)[:-2], cosines(gram, theirs)[:-2])


def _figures(update: Float[Tensor, "reward"], mean: Float[Tensor, "reward"]) -> dict[str, float]:
    figures = {}
    for name, cos in (("update", update), ("mean", mean)):
        figures[f"{name}/cos_min"] = cos.min().item()
        figures[f"{name}/cos_mean"] = cos.mean().item()
        figures[f"{name}/cos_var"] = cos.var(correction=0).item()
    return figures


def in_conflict(cos_min: float) -> bool:
    """Whether an update goes against some reward by more than rounding."""
    return cos_min < -1e-6
