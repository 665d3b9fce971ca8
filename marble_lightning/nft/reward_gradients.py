"""Per-reward gradients of one micro-batch: by one autograd pass per reward, or by two whatever their number.

Each reward's loss is a weighted sum of the same per-sample losses, sum_i (c+_ik L+_i + c-_ik L-_i), and no layer couples
samples. So one backward pass of sum_i L+_i meets, at every linear layer, all that the gradients of all rewards need: the
layer's input and the gradient of its output, sample by sample. Weighing the samples by c+_ik there gives every reward's
share at once; a second pass does the same for L-.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marble_lightning.nft.loss import Coefficients


def gradients_by_passes(
    losses: Float[Tensor, " reward"], parameters: Sequence[nn.Parameter], loss_scale: float = 1.0
) -> Float[Tensor, "reward parameter"]:
    """One autograd pass per reward: the reference, whose time grows with the number of rewards.

    Args:
        losses: Loss of each reward, from one graph, which is kept.
        parameters: Trainable parameters, in the order of the flat result.
        loss_scale: Multiplies losses on the way back, so that half precision does not underflow; undone in the result.
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
    """Per-reward gradients of linear layers in two backward passes, whatever the number of rewards.

    While `on`, every forward pass that builds a graph leaves taps in it, identities whose way back tells a layer's input
    and the gradient of its output. Switch it between micro-batches only: gradient checkpointing runs layers again on the
    way back and must find them as they were.

    Args:
        module: What is trained.
        parameters: Its trainable parameters, in the order of the flat result.

    Raises:
        ValueError: A parameter is not the weight or bias of an `nn.Linear` of its own.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        places = {parameter: index for index, parameter in enumerate(parameters)}
        self.sizes = [parameter.numel() for parameter in parameters]
        self.layers: list[tuple[nn.Module, int | None, int | None]] = []
        found: set[nn.Parameter] = set()
        for layer in module.modules():
            own = {parameter for parameter in layer.parameters(recurse=False) if parameter in places}
            if own and type(layer).forward is nn.Linear.forward and not own & found:
                named = dict(layer.named_parameters(recurse=False))
                weight, bias = (places[named[name]] if named.get(name) in own else None for name in ("weight", "bias"))
                self.layers.append((layer, weight, bias))
                found |= own
        if missed := set(parameters) - found:
            names = sorted(name for name, parameter in module.named_parameters() if parameter in missed)
            raise ValueError(
                "`gradient_passes: two` needs every trainable parameter to be the weight or bias of one nn.Linear. Found "
                f"{len(missed)} that are not, such as {names[0] if names else 'one outside the module'}; "
                "set `gradient_passes: per_reward`."
            )

        self.on = True
        self.anchor = torch.zeros((), requires_grad=True)
        self.parts: list[Tensor] | None = None
        """What is being gathered, a part of the result per parameter; None in the backward pass of any other loss."""
        for layer, weight, bias in self.layers:
            layer.register_forward_hook(self._hook(weight, bias))

    def _hook(self, weight: int | None, bias: int | None) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not (self.on and torch.is_grad_enabled()):
                return output
            if self.anchor.device != output.device:
                self.anchor = torch.zeros((), requires_grad=True, device=output.device)
            return CaptureGrad.apply(output, as_multiplied(inputs[0]), self.anchor, self, weight, bias)

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
            plus: L+ of each sample, from a forward pass while this was on.
            minus: L- of each sample, from the same.
            coefficients: What they count for in each reward's loss.
            loss_scale: Multiplies losses on the way back, so that half precision does not underflow; undone in the result.
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
        """Add what one layer's input and output gradient, sample by sample, mean for every reward."""
        if self.parts is None:
            return
        samples, c = len(gradient), self.weights.float()
        gradient = gradient.float().reshape(samples, -1, gradient.shape[-1])
        if weight is not None:
            inputs = inputs.float().reshape(samples, -1, inputs.shape[-1])
            self.parts[weight] += c.T @ (gradient.mT @ inputs).flatten(1)
        if bias is not None:
            self.parts[bias] += c.T @ gradient.sum(1)


class RewardGradients:
    """Every reward's gradient of a micro-batch, (reward, parameter).

    Args:
        passes: `two` backward passes, whatever the number of rewards, or one `per_reward`, the reference.
        module: What is trained.
        parameters: Its trainable parameters, in the order of the flat result.
    """

    def __init__(self, passes: Literal["two", "per_reward"], module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.taps = LinearTaps(module, parameters) if passes == "two" else None

    def set_capture(self, expected: bool) -> None:
        """Say whether the next forward pass is for per-reward gradients.

        They go back through it several times, which compiled code cannot: it runs as written meanwhile.
        """
        torch.compiler.set_stance("force_eager" if expected else "default")
        if self.taps:
            self.taps.on = expected

    def __call__(
        self,
        plus: Float[Tensor, " sample"],
        minus: Float[Tensor, " sample"],
        coefficients: Coefficients,
        scaler: torch.amp.GradScaler | None,
    ) -> Float[Tensor, "reward parameter"]:
        """Gradients of every reward's loss; the graph of L+ and L-, from a pass that was expected, is kept."""
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        if self.taps:
            return self.taps.gradients(plus, minus, coefficients, loss_scale)
        return gradients_by_passes(coefficients.losses(plus, minus), self.parameters, loss_scale)


class CaptureGrad(torch.autograd.Function):
    """The identity, which on the way back tells its owner a layer's input and the gradient of its output."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, taps: LinearTaps, weight: int | None, bias: int | None
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.taps, ctx.places = taps, (weight, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.taps._add(*ctx.saved_tensors, gradients[0], *ctx.places)
        return gradients[0], None, None, None, None, None


def as_multiplied(inputs: Tensor) -> Tensor:
    """A linear layer's input in the precision it is multiplied in: autocast's where that is on, to keep half the bytes."""
    kind = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else inputs


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " parameter"]:
    """Tensors as one vector, in float32."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def add_flat(gradient: Float[Tensor, " parameter"], parameters: Sequence[nn.Parameter]) -> None:
    """Add a flat gradient to what the parameters have gathered."""
    pieces = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        piece = piece.view_as(parameter).to(parameter.dtype)
        parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)


class MergedGradient:
    """A refresh's merged gradient between its solution and the optimizer step.

    It is solved for in `training_step`, and written only when Lightning is about to step. Written at once, it would be
    erased where Lightning zeroes the gradients, between a step's first forward and backward pass, and divided by a loss
    scale that it was never multiplied by.
    """

    def __init__(self) -> None:
        self.gradient: Float[Tensor, " parameter"] | None = None

    def hold(self, gradient: Float[Tensor, " parameter"]) -> None:
        """Keep a merged gradient, the same on all ranks."""
        self.gradient = gradient

    def added_to(self, update: Float[Tensor, " parameter"]) -> Float[Tensor, " parameter"]:
        """An update with what is held."""
        return update if self.gradient is None else update + self.gradient

    def write(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add what is held to the parameters' `grad`, and let go of it."""
        if self.gradient is not None:
            add_flat(self.gradient, parameters)
            self.gradient = None
