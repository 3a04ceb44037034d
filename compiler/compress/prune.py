"""Removes units of channel groups from a UNet: what remains, as weights and as a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdc.compiler.compress.channels import ChannelGroup, axis_of
from sdc.compiler.load.networks import make_empty
from sdc.compiler.load.widths import NOTE, NOTE_TEXT, WIDTHS, widths_of
from sdc.compiler.tiny.memory_layout import channels_last

Kept = Mapping[str, np.ndarray]
"""For groups by name, the units that stay: rising indices. A group that is not named keeps all."""


@dataclass(frozen=True)
class UnetState:
    """A UNet without modules: content of its ``config.json``, with the widths if it is pruned, and its weights."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(each.numel() for each in self.weights.values())

    def build(self) -> UNet2DConditionModel:
        """The network, in inference mode, with these very tensors as its weights."""
        unet = make_empty("unet", self.config, origin="a pruned UNet")
        assert isinstance(unet, UNet2DConditionModel)
        unet.load_state_dict(dict(self.weights), strict=True, assign=True)
        return unet.requires_grad_(False).eval()

    def build_empty(self) -> UNet2DConditionModel:
        """The network without storage."""
        unet = make_empty("unet", self.config, origin="a pruned UNet")
        assert isinstance(unet, UNet2DConditionModel)
        return unet


def own_network(state: UnetState, device: torch.device) -> UNet2DConditionModel:
    """A network with its own copies of the weights."""
    return channels_last(copy.deepcopy(state.build())).to(device)


def state_of(network: UNet2DConditionModel, config: Mapping[str, Any]) -> UnetState:
    """The network's weights as they are now; on the CPU they are not copied."""
    return UnetState(config, {name: each.detach().cpu() for name, each in network.state_dict().items()})


def prune(state: UnetState, groups: Sequence[ChannelGroup], kept: Kept) -> UnetState:
    """The UNet with only the units in `kept`; on inputs it computes what it did with the others zeroed.

    Args:
        state: of the whole UNet; it is not changed, and tensors that stay whole are shared.
        groups: of this UNet.
        kept: at least one unit in every group.
    """
    unet = state.build_empty()
    weights = dict(state.weights)
    widths: dict[str, dict[str, int]] = {name: dict(each) for name, each in state.config.get(WIDTHS, {}).items()}
    for group in groups:
        units = kept.get(group.name)
        if units is None or len(units) == group.units:
            continue
        for member in group.members:
            layer: Any = unet.get_submodule(member.layer)
            channels = np.sort(member.channels[units].ravel())
            axis = axis_of(layer, member.side)
            _take(weights, f"{member.layer}.weight", axis, channels)
            if axis == 0 and layer.bias is not None:
                _take(weights, f"{member.layer}.bias", 0, channels)
            widths[member.layer] = _narrowed(widths.get(member.layer) or widths_of(layer), member.side, len(channels))
        if group.kind == "heads":
            widths[group.name.removesuffix(".to_out.0")] = {"heads": len(units)}
    if not widths:
        return state
    return UnetState({**state.config, NOTE: NOTE_TEXT, WIDTHS: dict(sorted(widths.items()))}, weights)


def _take(weights: dict[str, Tensor], name: str, axis: int, channels: np.ndarray) -> None:
    weights[name] = weights[name].index_select(axis, torch.from_numpy(channels))


def _narrowed(widths: Mapping[str, int], side: str, channels: int) -> dict[str, int]:
    """A layer's widths with `channels` on one side; a norm keeps its channels per group."""
    if "groups" in widths:
        return {"channels": channels, "groups": widths["groups"] * channels // widths["channels"]}
    return {**widths, side: channels}
