"""Check that the weights of a loaded model are finite."""

from torch import Tensor, nn


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, in one pass without extra memory.

    >>> import torch
    >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.tensor([torch.inf]))
    (True, False, False)
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())  # with a NaN, both are NaN


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of a model's parameters and buffers that hold NaN or infinity."""
    return sorted(name for name, tensor in model.state_dict().items() if not is_finite(tensor))


def check_finite(owner: str, model: nn.Module, source: object) -> None:
    """Refuse a model with NaN or infinity among its weights, after conversion to its precision.

    Args:
        owner: Name of the reward, for error messages.
        model: The frozen model.
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: with the name of one such weight.
    """
    if names := non_finite_weights(model):
        raise ValueError(
            f"{owner}: the checkpoint in '{source}' must hold finite numbers. Found others in {len(names)} weights, such "
            f"as {names[0]}. Download it again, or use `dtype` bfloat16 or float32."
        )
