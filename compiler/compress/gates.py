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

Units = Mapping[str, Sequence[Sequence[int]]]
"""For each layer that reads them, by name: its input channels of each unit that is off."""


@contextmanager
def units_off(unet: UNet2DConditionModel, off: Units, *, rows: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Within the block the units count for nothing, by gates at zero in front of the layers that read them.

    Args:
        unet: has their weights.
        off: which units.
        rows: of a batch, for gates that derivatives can be taken by; None for those of any batch.

    Yields:
        The gates of each layer by name, [rows, units].
    """
    gates = {
        layer: torch.zeros(
            rows or 1, len(units), device=unet.get_parameter(f"{layer}.weight").device, requires_grad=rows is not None
        )
        for layer, units in off.items()
    }
    with ExitStack() as stack:
        for layer, units in off.items():
            part = unet.get_submodule(layer)
            stack.callback(part.register_forward_pre_hook(_gating(gates[layer], units)).remove)
        yield gates


def _gating(gates: Tensor, units: Sequence[Sequence[int]]) -> Any:
    channels = channels_of(units).to(gates.device)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read = inputs[0]
        axis = _channel_axis(layer, read.ndim)
        by_channel = gates.repeat_interleave(len(units[0]), dim=1)
        factors = by_channel.new_ones(len(gates), read.shape[axis]).index_copy(1, channels, by_channel)
        shape = [len(gates), *(1 for _ in range(read.ndim - 1))]
        shape[axis] = read.shape[axis]
        return (read * factors.reshape(shape), *inputs[1:])

    return hook


def channels_of(units: Sequence[Sequence[int]]) -> Tensor:
    """All channels of some units, in order: [C], int64."""
    return torch.tensor([channel for unit in units for channel in unit])


@contextmanager
def closed_gates(
    unet: UNet2DConditionModel, groups: Sequence[ChannelGroup], kept: Mapping[str, np.ndarray]
) -> Iterator[None]:
    """Within the block, units that are not in `kept` count for nothing; groups that are not named are whole."""
    off = {
        group.name: [group.channels_of(int(unit)) for unit in np.setdiff1d(range(group.units), kept[group.name])]
        for group in groups
        if group.name in kept
    }
    with units_off(unet, {layer: units for layer, units in off.items() if units}):
        yield


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
