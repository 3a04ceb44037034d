"""Channels of a UNet that can be removed, and all that goes with each: by the dependency graph of torch-pruning.

Four kinds of channels lie between two layers without reaching the residual stream, so that skip connections, their
concatenations and the norms over them stay as they are:

- hidden channels of a residual block (conv1 → norm2 → conv2), with their share of the time embedding's projection;
- heads of attention (to_q, to_k, to_v → to_out);
- hidden channels of a feed-forward (both halves of GEGLU's projection → the second layer);
- hidden channels of the time embedding (linear_1 → linear_2).

The smallest part that can go is a *unit*: a head, or the channels of one group of a GroupNorm, so that the statistics
of the other groups stay as they were. Removing a unit is therefore exactly what zeroing it at the layer that reads it
is; which rows of which layers those are is the graph's answer, not a table of names.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdc.engines.errors import InputError

Kind = Literal["residual", "heads", "feed-forward", "time embedding"]

KINDS: tuple[Kind, ...] = ("residual", "heads", "feed-forward", "time embedding")

Side = Literal["in", "out"]
"""Whether channels are inputs or outputs of a layer; a norm's are called outputs."""

TRACED_SIDE = 8
"""Side of the smallest feature map of the traced run; only shapes are computed, so that size costs nothing."""


@dataclass(frozen=True)
class Member:
    """The part that one layer has in a group.

    Attributes:
        layer: its name in the UNet.
        side: of the layer.
        channels: [units, C], int64: the layer's channels that go with each unit.
        parameters: that each unit has in this layer.
    """

    layer: str
    side: Side
    channels: np.ndarray
    parameters: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels between two layers, in units that can be removed.

    Attributes:
        name: of the layer that reads them; its inputs are the group's channels.
        kind: what they are.
        units: how many there are.
        unit_channels: channels of a unit, which are neighbours at the layer that reads them.
        members: all layers that change when a unit is removed, the reading one among them.
    """

    name: str
    kind: Kind
    units: int
    unit_channels: int
    members: tuple[Member, ...]

    @property
    def width(self) -> int:
        """Channels that the group has."""
        return self.units * self.unit_channels

    def channels_of(self, unit: int) -> list[int]:
        """A unit's channels at the layer that reads them."""
        return list(range(unit * self.unit_channels, (unit + 1) * self.unit_channels))

    @property
    def unit_parameters(self) -> int:
        """Parameters that go with one unit."""
        return sum(member.parameters for member in self.members)

    def kept_units(self, multiple: int) -> tuple[int, ...]:
        """Numbers of units that may be kept, falling from all of them.

        All fewer are multiples of `multiple` in channels; for heads, whose width is what the engines see, any number.
        """
        step = 1 if self.kind == "heads" else math.lcm(self.unit_channels, multiple) // self.unit_channels
        fewer = range(step, self.units, step)
        return (self.units, *reversed(fewer))


def find_groups(unet: UNet2DConditionModel) -> tuple[ChannelGroup, ...]:
    """All groups of a UNet, in the order of its modules.

    Args:
        unet: without storage (on the device ``meta``): only its shapes are traced.

    Raises:
        InputError: there are none, or channels are coupled with layers in a way that no unit can be removed from.
    """
    graph = _trace(unet)
    names = {module: name for name, module in unet.named_modules()}
    groups = tuple(_group(graph, names, *found) for found in _readers(unet))
    if not groups:
        raise InputError(
            "the UNet has no channels that could be removed", hint="give a model of Stable Diffusion's kind"
        )
    return groups


def _trace(unet: UNet2DConditionModel) -> torch_pruning.DependencyGraph:
    config = unet.config
    side = TRACED_SIDE * 2 ** (len(config["block_out_channels"]) - 1)
    inputs = {
        "sample": torch.empty(2, config["in_channels"], side, side, device="meta"),
        "timestep": torch.empty(2, device="meta"),
        "encoder_hidden_states": torch.empty(2, 77, _context_width(config), device="meta"),
    }
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = torch.empty(2, config["time_cond_proj_dim"], device="meta")
    needed = {name: each.requires_grad for name, each in unet.named_parameters()}
    unet.requires_grad_(True)  # the graph is read off autograd's
    try:
        return torch_pruning.DependencyGraph().build_dependency(unet, example_inputs=inputs)
    finally:
        for name, each in unet.named_parameters():
            each.requires_grad_(needed[name])


def _context_width(config: dict[str, object]) -> int:
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        raise InputError(
            f"cross_attention_dim {width!r} is no one width", hint="give a model of Stable Diffusion's kind"
        )
    return width


def _readers(unet: UNet2DConditionModel) -> Iterator[tuple[Kind, nn.Conv2d | nn.Linear, int]]:
    """(kind, layer that reads a group's channels, channels of a unit)."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            yield "residual", module.conv2, module.norm2.num_channels // module.norm2.num_groups
        elif isinstance(module, Attention):
            yield "heads", module.to_out[0], module.to_out[0].in_features // module.heads
        elif isinstance(module, FeedForward):
            yield "feed-forward", module.net[-1], 1
        elif isinstance(module, TimestepEmbedding):
            yield "time embedding", module.linear_2, 1


def _group(
    graph: torch_pruning.DependencyGraph,
    names: dict[nn.Module, str],
    kind: Kind,
    reader: nn.Conv2d | nn.Linear,
    unit: int,
) -> ChannelGroup:
    is_conv = isinstance(reader, nn.Conv2d)
    prune = torch_pruning.prune_conv_in_channels if is_conv else torch_pruning.prune_linear_in_channels
    width = reader.weight.shape[1]
    members = []
    for item in graph.get_pruning_group(reader, prune, list(range(width))):
        layer = item.dep.target.module
        if layer in names and any(True for _ in layer.parameters(recurse=False)):
            side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            channels = _by_unit(item.idxs, [root // unit for root in item.root_idxs], width // unit)
            _check(layer, names[layer], channels)
            members.append(_member(names[layer], layer, side, channels))
    return ChannelGroup(names[reader], kind, width // unit, unit, tuple(members))


def _by_unit(channels: list[int], unit_of: list[int], units: int) -> np.ndarray:
    """A layer's channels as [units, C], given the unit of each."""
    order = np.lexsort((channels, unit_of))
    return np.array(channels, np.int64)[order].reshape(units, -1)


def _check(layer: nn.Module, name: str, channels: np.ndarray) -> None:
    """Raise unless what remains of the layer computes what it did, whichever units go."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return
    if isinstance(layer, nn.GroupNorm):
        group_of = channels // (layer.num_channels // layer.num_groups)
        if len(np.unique(group_of)) == len(channels) and (group_of == group_of[:, :1]).all():
            return
    raise InputError(f"channels cannot be removed: {name}, a {type(layer).__name__}, takes its statistics over them")


def _member(name: str, layer: Any, side: Side, channels: np.ndarray) -> Member:
    axis = axis_of(layer, side)
    each = layer.weight.numel() // layer.weight.shape[axis]
    if axis == 0 and layer.bias is not None:
        each += 1
    return Member(name, side, channels, each * channels.shape[1])


def axis_of(layer: nn.Module, side: Side) -> int:
    """The axis of the weight that a layer's channels of one side are along."""
    return 1 if side == "in" and not isinstance(layer, nn.GroupNorm) else 0
