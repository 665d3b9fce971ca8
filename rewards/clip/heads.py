"""The small regression heads of `Aesthetic`, `ImageReward` and `HPSv3`."""

from collections.abc import Mapping

from torch import Tensor, nn

from rewards.checkpoints import check_finite

WIDTHS = (1024, 128, 64, 16, 1)
"""Output widths of the layers. There is no activation between them."""


def regression_head(owner: str, *, width: int, weights: Mapping[str, Tensor], source: object) -> nn.Sequential:
    """Build the head: five linear layers, float32 and frozen, with indices as published, which count dropout layers.

    Args:
        owner: Name of the reward, for error messages.
        width: Dimension of the input features.
        weights: Weights by name, `0.weight` to `7.bias`.
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: if the weights do not fit such a head.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip((width, *WIDTHS), WIDTHS, strict=False)):
        layers.append(nn.Linear(inputs, outputs))
        if number < 3:
            layers.append(nn.Dropout((0.2, 0.2, 0.1)[number]))
    head = nn.Sequential(*layers)
    _load(owner, head, weights, f"the five linear layers of a head on {width} features", source)
    return head


def linear_head(owner: str, *, width: int, weights: Mapping[str, Tensor], source: object) -> nn.Linear:
    """Build a head of a single linear layer, float32 and frozen.

    Args:
        owner: Name of the reward, for error messages.
        width: Dimension of the input features.
        weights: `weight` (1, width) and `bias` (1,).
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: if the weights do not fit such a head.
    """
    head = nn.Linear(width, 1)
    _load(owner, head, weights, f"one linear layer from {width} features to one score", source)
    return head


def preference_head(owner: str, *, width: int, weights: Mapping[str, Tensor], source: object) -> nn.Sequential:
    """Build HPSv3's head: three linear layers with ReLU, float32 and frozen, with indices as published.

    Args:
        owner: Name of the reward, for error messages.
        width: Dimension of the input features.
        weights: Weights by name, `0.weight` to `5.bias`.
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: if the weights do not fit such a head.
    """
    hidden = (nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU())
    head = nn.Sequential(*hidden, nn.Linear(16, 2))
    _load(owner, head, weights, f"the three linear layers of a head on {width} features", source)
    return head


def _load(owner: str, head: nn.Module, weights: Mapping[str, Tensor], layers: str, source: object) -> None:
    """Load weights into a head and freeze it."""
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{owner}: {source} must hold {layers}. Found others: {str(error).splitlines()[-1].strip()} "
            "Use the head that was trained on this model's features."
        ) from error
    check_finite(owner, head, source)
    head.requires_grad_(False).eval()
