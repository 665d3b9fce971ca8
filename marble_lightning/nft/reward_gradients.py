"""Per-reward gradients of one micro-batch, by one backward pass per reward or by two for any number of rewards.

Each reward's loss is a weighted sum of the same per-sample losses, sum_i (c+_ik L+_i + c-_ik L-_i), and no layer couples
samples. So one backward pass of sum_i L+_i gives, at every linear layer, its input and the gradient of its output for each
sample. Weighting the samples by c+_ik turns them into the contribution of L+ to every reward's gradient. A second pass does
the same for L-.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marble_lightning.nft.loss import Coefficients


def gradients_by_passes(
    losses: Float[Tensor, " reward"], parameters: Sequence[nn.Parameter], loss_scale: float = 1.0
) -> Float[Tensor, "reward parameter"]:
    """One backward pass per reward: the reference method, with a time proportional to the number of rewards.

    Args:
        losses: Loss of each reward; their graph is kept.
        parameters: Trainable parameters, in the order of the flat result.
        loss_scale: Factor of the losses in the backward pass, so that half precision does not underflow; the result is
            divided by it.
    """
    with torch.autocast(losses.device.type, enabled=False):
        return torch.stack(
            [
                flat(torch.autograd.grad(loss * loss_scale, parameters, retain_graph=True, materialize_grads=True))
                / loss_scale
                for loss in losses
            ]
        )


class LinearTaps:
    """Per-reward gradients of linear layers in two backward passes, for any number of rewards.

    While `on`, every forward pass with a graph inserts a tap after each linear layer: an identity function (`CaptureGrad`)
    that captures the layer's input and the gradient of its output in the backward pass. Switch it between micro-batches
    only: gradient checkpointing runs layers again in the backward pass and needs the same taps there.

    Args:
        module: The module that is trained.
        parameters: Its trainable parameters, in the order of the flat result.

    Raises:
        ValueError: A parameter is not the weight or bias of exactly one `nn.Linear`.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        positions = {parameter: index for index, parameter in enumerate(parameters)}
        self.sizes = [parameter.numel() for parameter in parameters]
        self.layers: list[tuple[nn.Module, int | None, int | None]] = []
        covered: set[nn.Parameter] = set()
        for layer in module.modules():
            trained = {parameter for parameter in layer.parameters(recurse=False) if parameter in positions}
            if trained and type(layer).forward is nn.Linear.forward and not trained & covered:
                named = dict(layer.named_parameters(recurse=False))
                weight, bias = (
                    positions[named[name]] if named.get(name) in trained else None for name in ("weight", "bias")
                )
                self.layers.append((layer, weight, bias))
                covered |= trained
        if missing := set(parameters) - covered:
            names = sorted(name for name, parameter in module.named_parameters() if parameter in missing)
            raise ValueError(
                "`gradient_passes: two` needs every trainable parameter to be the weight or bias of one nn.Linear. Found "
                f"{len(missing)} that are not, such as {names[0] if names else 'one outside the module'}; "
                "set `gradient_passes: per_reward`."
            )

        self.on = True
        self.anchor = torch.zeros((), requires_grad=True)
        self.parts: list[Tensor] | None = None
        """Columns of the result for each parameter, which the backward pass adds to; None outside `gradients`."""
        for layer, weight, bias in self.layers:
            layer.register_forward_hook(self._hook(weight, bias))

    def _hook(self, weight: int | None, bias: int | None) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not (self.on and torch.is_grad_enabled()):
                return output
            if self.anchor.device != output.device:
                self.anchor = torch.zeros((), requires_grad=True, device=output.device)
            return CaptureGrad.apply(output, to_autocast_dtype(inputs[0]), self.anchor, self, weight, bias)

        return hook

    def gradients(
        self,
        plus: Float[Tensor, " sample"],
        minus: Float[Tensor, " sample"],
        coefficients: Coefficients,
        loss_scale: float = 1.0,
    ) -> Float[Tensor, "reward parameter"]:
        """Gradients of every reward's loss; the graph is kept.

        Args:
            plus: L+ of each sample, from a forward pass with the taps `on`.
            minus: L- of each sample, from the same forward pass.
            coefficients: Loss coefficients c+ and c- of each sample and reward.
            loss_scale: Factor of the losses in the backward pass, so that half precision does not underflow; the result is
                divided by it.
        """
        rewards = coefficients.plus.shape[1]
        total = torch.zeros(rewards, sum(self.sizes), device=plus.device)
        self.parts = list(total.split(self.sizes, dim=1))
        try:
            with torch.autocast(plus.device.type, enabled=False):  # the sums over samples and tokens stay float32
                for losses, self.weights in ((plus, coefficients.plus), (minus, coefficients.minus)):
                    torch.autograd.grad(losses.sum() * loss_scale, self.anchor, retain_graph=True, allow_unused=True)
        finally:
            self.parts = None
        return total if loss_scale == 1 else total.div_(loss_scale)

    def _add(self, inputs: Tensor, gradient: Tensor, weight: int | None, bias: int | None) -> None:
        """Add the gradients of one layer for every reward, from its input and the gradient of its output."""
        if self.parts is None:
            return
        samples, c = len(gradient), self.weights.float()
        gradient = gradient.reshape(samples, -1, gradient.shape[-1])
        if weight is not None:
            inputs = inputs.reshape(samples, -1, inputs.shape[-1])
            self.parts[weight] += c.T @ product_in_float32(gradient.mT, inputs).flatten(1)
        if bias is not None:
            self.parts[bias] += c.T @ gradient.sum(1, dtype=torch.float32)


class RewardGradients:
    """Computes the gradients of all rewards of a micro-batch, (reward, parameter).

    Args:
        passes: `two` backward passes for any number of rewards, or one `per_reward`, the reference method.
        module: The module that is trained.
        parameters: Its trainable parameters, in the order of the flat result.
    """

    def __init__(self, passes: Literal["two", "per_reward"], module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.taps = LinearTaps(module, parameters) if passes == "two" else None
        if self.taps:
            self.taps.on = False

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture per-reward gradients of the forward and backward passes within.

        They need several backward passes through one graph, which compiled code does not support, so the passes are eager.
        """
        with torch.compiler.set_stance("force_eager"):
            if self.taps:
                self.taps.on = True
            try:
                yield
            finally:
                if self.taps:
                    self.taps.on = False

    def __call__(
        self,
        plus: Float[Tensor, " sample"],
        minus: Float[Tensor, " sample"],
        coefficients: Coefficients,
        scaler: torch.amp.GradScaler | None,
    ) -> Float[Tensor, "reward parameter"]:
        """Gradients of every reward's loss; the graph of L+ and L-, from a forward pass within `capture`, is kept."""
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        if self.taps:
            return self.taps.gradients(plus, minus, coefficients, loss_scale)
        return gradients_by_passes(coefficients.losses(plus, minus), self.parameters, loss_scale)


class CaptureGrad(torch.autograd.Function):
    """The identity; its backward pass gives a layer's input and the gradient of its output to the `LinearTaps`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, taps: LinearTaps, weight: int | None, bias: int | None
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.taps, ctx.positions = taps, (weight, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.taps._add(*ctx.saved_tensors, gradients[0], *ctx.positions)
        return gradients[0], None, None, None, None, None


def product_in_float32(one: Float[Tensor, "batch m n"], other: Float[Tensor, "batch n p"]) -> Float[Tensor, "batch m p"]:
    """Matrix products that are summed in float32; a GPU then multiplies half precision as it is, many times as fast."""
    if one.is_cuda and one.dtype == other.dtype and one.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()


def to_autocast_dtype(inputs: Tensor) -> Tensor:
    """A linear layer's input in autocast's precision, if autocast is enabled: half the bytes are kept."""
    device_type = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else inputs


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " parameter"]:
    """Tensors as one flat vector in float32."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def add_flat(gradient: Float[Tensor, " parameter"], parameters: Sequence[nn.Parameter]) -> None:
    """Add a flat gradient to the parameters' `grad`."""
    pieces = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        piece = piece.view_as(parameter).to(parameter.dtype)
        parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)


class MergedGradient:
    """Holds a refresh's merged gradient from its solution until the optimizer step.

    The gradient is computed in `training_step` and written just before Lightning steps. If it were written at once,
    Lightning would zero it between the step's first forward and backward pass, and would divide it by a loss scale that it
    was not multiplied by.
    """

    def __init__(self) -> None:
        self.gradient: Float[Tensor, " parameter"] | None = None

    def hold(self, gradient: Float[Tensor, " parameter"]) -> None:
        """Keep a merged gradient, the same on all ranks."""
        self.gradient = gradient

    def plus(self, update: Float[Tensor, " parameter"]) -> Float[Tensor, " parameter"]:
        """The sum of an update and the held gradient."""
        return update if self.gradient is None else update + self.gradient

    def write(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the held gradient to the parameters' `grad`, and free it."""
        if self.gradient is not None:
            add_flat(self.gradient, parameters)
            self.gradient = None
