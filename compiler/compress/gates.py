"""Gates on units: a factor, 1 as the network is, on what a layer reads of a unit. Set to 0, the unit is gone.

Gates are hooks; no weight is touched, and the network is as it was when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdc.compiler.compress.channels import ChannelGroup


@contextmanager
def closed_gates(
    unet: UNet2DConditionModel, groups: Sequence[ChannelGroup], kept: Mapping[str, np.ndarray]
) -> Iterator[None]:
    """Within the block, units that are not in `kept` count for nothing; groups that are not named are whole."""
    with ExitStack() as stack:
        for group in groups:
            if group.name not in kept:
                continue
            layer = unet.get_submodule(group.name)
            factors = torch.zeros(group.units, group.unit_channels, device=layer.weight.device)
            factors[torch.from_numpy(kept[group.name])] = 1
            handle = layer.register_forward_pre_hook(_close(factors.flatten()))
            stack.callback(handle.remove)
        yield


def _close(factors: Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shaped = factors[:, None, None] if isinstance(layer, nn.Conv2d) else factors
        return (inputs[0] * shaped, *inputs[1:])

    return hook


class GateGradients:
    """Derivatives of a loss by all gates, for each row of the batch on its own.

    Used as a context; after each backward pass within it, `take` returns what that pass found.
    """

    def __init__(self, unet: UNet2DConditionModel, groups: Sequence[ChannelGroup]) -> None:
        self._unet, self._groups = unet, groups
        self._found: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> GateGradients:
        for group in self._groups:
            layer = self._unet.get_submodule(group.name)
            self._stack.callback(layer.register_forward_pre_hook(self._watch(group)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, group: ChannelGroup) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            value = read.detach()

            def record(gradient: Tensor) -> None:
                by_channel = (gradient * value).float()
                axes = [axis for axis in range(1, by_channel.ndim) if axis != _channel_axis(layer, by_channel.ndim)]
                summed = by_channel.sum(axes) if axes else by_channel
                self._found[group.name] = summed.reshape(len(summed), group.units, group.unit_channels).sum(2)

            read.register_hook(record)
            return (read, *inputs[1:])

        return hook

    def take(self) -> dict[str, Tensor]:
        """[B, units] for each group by name."""
        found, self._found = self._found, {}
        return found


def _channel_axis(layer: nn.Module, ndim: int) -> int:
    return 1 if isinstance(layer, nn.Conv2d) else ndim - 1
