"""Networks whose layers have other widths than their class gives them: the widths stand in the configuration.

A pruned network is not what its ``config.json`` builds: layers of one block differ in width. So the file has one more
entry, ``sdc_widths``, with the widths of every layer that differs::

    "sdc_widths": {
        "down_blocks.0.resnets.0.conv1": {"in": 64, "out": 48},
        "down_blocks.0.resnets.0.norm2": {"channels": 48, "groups": 24},
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": {"heads": 3}
    }

Any convolution, linear layer, norm or attention may be named. diffusers says that it ignores the entry and then refuses
the weights' shapes; `NOTE` in the file says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sdc.engines.errors import InputError

WIDTHS = "sdc_widths"
"""Entry of ``config.json``."""

NOTE = "sdc_note"
"""Entry of ``config.json`` beside it, for whoever opens the folder with something else."""

NOTE_TEXT = (
    "pruned by sdc: layers have the widths of sdc_widths, which UNet2DConditionModel does not know; "
    "diffusers cannot load these weights, `sdc export --model FOLDER` can"
)

Widths = Mapping[str, Mapping[str, int]]


def set_widths(network: nn.Module, widths: Any, *, origin: str) -> None:
    """Give layers of an empty network other widths, in place.

    Args:
        network: without storage (on the device ``meta``).
        widths: the entry of the configuration.
        origin: for errors.

    Raises:
        InputError: a layer is not there, is of a kind that has no such width, or a width is none.
    """
    if not isinstance(widths, Mapping):
        raise InputError(f"{WIDTHS} of {origin} is no table of layers", hint="compress the model again")
    for name, values in widths.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"{WIDTHS} of {origin} names {name}, which the network does not have") from error
        kind = next((kind for kind in _SETTERS if isinstance(layer, kind)), None)
        if kind is None:
            raise InputError(f"{WIDTHS} of {origin}: {name} is a {type(layer).__name__}, which has no widths")
        names, set_layer = _SETTERS[kind]
        if not isinstance(values, Mapping) or set(values) != set(names) or not all(map(_is_width, values.values())):
            raise InputError(
                f"{WIDTHS} of {origin}: {name} has {values!r}", hint=f"expected {', '.join(names)} above 0"
            )
        try:
            set_layer(layer, *(values[each] for each in names))
        except ValueError as error:
            raise InputError(f"{WIDTHS} of {origin}: {name} cannot be so: {error}") from error


def widths_of(layer: nn.Module) -> dict[str, int]:
    """What `set_widths` takes for a layer that is as it shall be.

    Raises:
        TypeError: the layer is of a kind that has no widths.
    """
    if isinstance(layer, nn.Conv2d):
        return {"in": layer.in_channels, "out": layer.out_channels}
    if isinstance(layer, nn.Linear):
        return {"in": layer.in_features, "out": layer.out_features}
    if isinstance(layer, nn.GroupNorm):
        return {"channels": layer.num_channels, "groups": layer.num_groups}
    if isinstance(layer, Attention):
        return {"heads": layer.heads}
    raise TypeError(f"a {type(layer).__name__} has no widths")


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _set_conv(layer: nn.Conv2d, width_in: int, width_out: int) -> None:
    layer.in_channels, layer.out_channels = width_in, width_out
    _resize(layer, (width_out, width_in // layer.groups, *layer.kernel_size), width_out)


def _set_linear(layer: nn.Linear, width_in: int, width_out: int) -> None:
    layer.in_features, layer.out_features = width_in, width_out
    _resize(layer, (width_out, width_in), width_out)


def _set_group_norm(layer: nn.GroupNorm, channels: int, groups: int) -> None:
    if channels % groups:
        raise ValueError(f"{channels} channels are no whole number for each of {groups} groups")
    layer.num_channels, layer.num_groups = channels, groups
    _resize(layer, (channels,), channels)


def _set_attention(layer: Any, heads: int) -> None:
    """The processor takes a head's width from its projections, which have entries of their own."""
    head_width = layer.inner_dim // layer.heads
    layer.heads = layer.sliceable_head_dim = heads
    layer.inner_dim = layer.inner_kv_dim = heads * head_width


def _resize(layer: nn.Module, shape: tuple[int, ...], bias: int) -> None:
    layer.weight = _empty(layer.weight, shape)
    if layer.bias is not None:
        layer.bias = _empty(layer.bias, (bias,))


def _empty(parameter: Any, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta", dtype=parameter.dtype), requires_grad=parameter.requires_grad)


_SETTERS: dict[Any, tuple[tuple[str, ...], Callable[..., None]]] = {
    nn.Conv2d: (("in", "out"), _set_conv),
    nn.Linear: (("in", "out"), _set_linear),
    nn.GroupNorm: (("channels", "groups"), _set_group_norm),
    Attention: (("heads",), _set_attention),
}
"""Kind of layer to the names of its widths and what sets them, given in that order."""
