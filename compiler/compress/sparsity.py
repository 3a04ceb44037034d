"""Weights that become zero and stay so: two of every four (2:4), or a share of each layer.

In 2:4 the four are neighbours along the input channels, for a convolution at one place of its kernel, which is what
sparse tensor cores take (`sdc.passes.sparse_weights`). Within four, or within what a share is of, those of the lowest
score become zero:

==========  =========================================================================================================
magnitude   |w|; looks at no data. A share is of the layer. Source: Han et al., arXiv:1506.02626, section 3
activation  |w| times the Euclidean norm of what its input channel gets, over noisy latents of all timesteps. A share
            is of each output's weights. Source: Sun et al., "A Simple and Effective Pruning Approach for Large
            Language Models" (Wanda), arXiv:2306.11695, section 3; a convolution's channel has a norm over all places
==========  =========================================================================================================

The first and the last convolution stay dense: they are a small part of the work, and all of the picture goes through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdc.compiler.compress.layer_sums import sum_over_probe
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.prune import UnetState
from sdc.compiler.compress.settings import Pattern
from sdc.engines.errors import NumericalError
from sdc.passes.sparse_weights import BLOCK, KEPT, first_dense_block

Masks = dict[str, Tensor]
"""For weights by name, of the weight's shape, bool: where it stays."""


@dataclass(frozen=True)
class ChosenLayers:
    """What of a network is changed.

    Attributes:
        names: of the layers, in the network's order.
        dense: names of the convolutions and linear layers that are not, and why.
    """

    names: tuple[str, ...]
    dense: dict[str, str]


def choose_layers(unet: UNet2DConditionModel, *, in_blocks: bool) -> ChosenLayers:
    """All convolutions and linear layers but the sensitive ones and those whose inputs make no blocks.

    Args:
        unet: may be without storage.
        in_blocks: whether inputs have to make blocks of four.
    """
    names, dense = [], {}
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        width = layer.weight.shape[1]
        if layer is unet.conv_in or layer is unet.conv_out:
            dense[name] = f"the {'first' if layer is unet.conv_in else 'last'} convolution"
        elif in_blocks and width % BLOCK:
            dense[name] = f"{width} inputs are no multiple of {BLOCK}"
        else:
            names.append(name)
    return ChosenLayers(tuple(names), dense)


@torch.no_grad()
def input_norms(unet: UNet2DConditionModel, names: tuple[str, ...], probe: Probe, *, rows: int) -> dict[str, Tensor]:
    """The Euclidean norm of every input channel of layers, over all rows and places of a probe.

    Args:
        unet: on the probe's device.
        names: of its convolutions and linear layers.
        probe: inputs over all timesteps.
        rows: at a time.

    Returns:
        [inputs], float64, on the CPU, for each layer by name.
    """
    squares = sum_over_probe(unet, names, probe, lambda _, inputs, __: inputs.square().sum(0), rows=rows)
    return {name: total.sqrt() for name, total in squares.items()}


def make_masks(
    weights: Mapping[str, Tensor], names: tuple[str, ...], pattern: Pattern, norms: Mapping[str, Tensor] | None
) -> Masks:
    """Which weights of layers stay.

    Args:
        weights: of the network, by name.
        names: of the layers.
        pattern: of the zeros.
        norms: of the layers' inputs, [inputs] each; None to go by magnitude.
    """
    masks = {}
    for name in names:
        weight = weights[f"{name}.weight"].detach().cpu()
        scores = weight.abs().float().movedim(1, -1)
        if norms is not None:
            scores = scores * norms[name].float()
        if pattern.structured:
            compared, kept = scores.reshape(-1, BLOCK), KEPT
        else:
            compared = scores.reshape(1, -1) if norms is None else scores.flatten(1)
            kept = max(1, round(compared.shape[1] * (1 - pattern.share)))
        stays = torch.zeros(compared.shape, dtype=torch.bool)
        stays.scatter_(1, compared.topk(kept, dim=1).indices, True)
        masks[f"{name}.weight"] = stays.reshape(scores.shape).movedim(-1, 1).contiguous()
    return masks


def apply_masks(state: UnetState, masks: Masks) -> UnetState:
    """The network with the other weights zero; tensors without a mask are shared."""
    zeroed = {name: torch.where(mask, state.weights[name], 0.0) for name, mask in masks.items()}
    return UnetState(state.config, {**state.weights, **zeroed})


@contextmanager
def frozen_zeros(unet: UNet2DConditionModel, masks: Masks) -> Iterator[None]:
    """Within the block, weights that a mask takes get a gradient of exactly zero.

    With no weight decay an optimiser that starts within the block leaves them where they are: at zero. Zeroed only
    after each step they would count in the norm that gradients are scaled down by, and in the optimiser's averages.
    """
    with ExitStack() as stack:
        for name, mask in masks.items():
            weight = unet.get_parameter(name)
            like = torch.empty_like(weight, dtype=torch.bool)  # laid out as the gradients are
            stack.callback(weight.register_hook(_masking(like.copy_(mask))).remove)
        yield


def _masking(mask: Tensor) -> Any:
    return lambda gradient: torch.where(mask, gradient, 0.0)


def check_zeros(weights: Mapping[str, Tensor], masks: Masks, pattern: Pattern) -> None:
    """See that weights are zero where masks say so, and of 2:4 that every block of four is what it shall be.

    Raises:
        NumericalError: some are not; it names the first block, or the first weight.
    """
    for name, mask in masks.items():
        weight = weights[name].detach().cpu()
        if pattern.structured:
            begin = first_dense_block(weight.numpy(), 1)
            if begin is not None:
                output, channel, *place = begin
                at = f" at {tuple(place)} of its kernel" if place else ""
                raise NumericalError(
                    f"{name} is not 2:4 sparse: of inputs {channel} to {channel + BLOCK - 1} of output {output}{at} "
                    f"more than {KEPT} weights are not zero"
                )
        alive = (weight != 0) & ~mask
        if alive.any():
            index = tuple(alive.nonzero()[0].tolist())
            raise NumericalError(f"{name} has {weight[index]:g} at {index}, where its mask has zero")


def describe_sparsity(state: UnetState, layers: ChosenLayers, masks: Masks) -> dict[str, Any]:
    """For the report: how many weights are zero, and which layers are dense."""
    return {
        "layers": {name: 1 - float(masks[f"{name}.weight"].double().mean()) for name in layers.names},
        "dense": layers.dense,
        "zeros": sum(int((state.weights[name] == 0).sum()) for name in masks),
    }
