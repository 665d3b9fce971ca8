"""Whether a model's weights are what its author saved."""

from torch import Tensor, nn


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor an infinity; in one pass that needs no memory.

    >>> import torch
    >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.tensor([torch.inf]))
    (True, False, False)
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())  # NaN is both


def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers of a model that hold NaN or an infinity."""
    return sorted(name for name, tensor in model.state_dict().items() if not is_finite(tensor))


def check_finite(owner: str, model: nn.Module, source: object) -> None:
    """Refuse a model with NaN or an infinity among its weights, in the precision they were brought to.

    Args:
        owner: name of the reward, for error messages.
        model: frozen.
        source: where its weights come from, for error messages.

    Raises:
        ValueError: with the name of such a weight.
    """
    if broken := not_finite(model):
        raise ValueError(
            f"{owner}: the checkpoint in '{source}' must hold finite numbers. Found others in {len(broken)} weights, such "
            f"as {broken[0]}. Download it again, or use `dtype` bfloat16 or float32."
        )
