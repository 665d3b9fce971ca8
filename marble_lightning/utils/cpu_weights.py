"""Weights that stay on the CPU while their modules visit another device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class CPUWeights:
    """The frozen parameters of modules, kept on the CPU while the modules are on another device.

    Frozen parameters do not change there. So `restore` drops the device's copy, where `to("cpu")` would copy it back.

    Args:
        modules: They may share parts. Parameters that are not frozen, or not on the CPU, are left to `to`, as are buffers.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._kept = [
            (part._parameters, name, parameter, parameter.data)
            for part in parts
            for name, parameter in part._parameters.items()
            if parameter is not None and not parameter.requires_grad and parameter.device.type == "cpu"
        ]

    def restore(self) -> None:
        """Give the modules their parameters on the CPU again."""
        for parameters, name, parameter, data in self._kept:
            parameter.data = data
            parameters[name] = parameter  # `to` puts a new parameter there if the tensors' types differ
        self._kept = []
