"""What layers take and give over a probe, summed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdc.compiler.compress.probes import Probe

Measure = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(a layer, what it takes, what it gives) -> what is summed; both are float32 rows of channels, [rows, channels]."""


@torch.no_grad()
def sum_over_probe(
    unet: UNet2DConditionModel, names: tuple[str, ...], probe: Probe, measure: Measure, *, rows: int
) -> dict[str, Tensor]:
    """Sums of a measure of layers over all rows and places of a probe, in float64 on the CPU, by name.

    Args:
        unet: on the probe's device.
        names: of its convolutions and linear layers.
        probe: inputs over all timesteps.
        measure: what is summed.
        rows: of the probe at a time.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = measure(layer, _rows_of(layer, inputs[0]), _rows_of(layer, output)).double().cpu()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(unet.get_submodule(name).register_forward_hook(watch(name)).remove)
        for part in probe.split(rows):
            unet(part.sample, part.timesteps, part.states)
    return sums


def _rows_of(layer: nn.Module, values: Tensor) -> Tensor:
    last = values.movedim(1, -1) if isinstance(layer, nn.Conv2d) else values
    return last.flatten(0, -2).float()
