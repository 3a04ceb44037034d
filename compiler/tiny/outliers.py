"""Outlier channels, as large models grow them, planted into a UNet that has none; what it computes stays the same.

    (x · k) (W / k) = x W    for a channel of x that a constant writes and the weight W reads

A small network's activations fit one scale for each tensor. Those of Stable Diffusion do not, so a method has to be
tried on outliers that are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FACTORS = (10.0, 50.0, 200.0)


@dataclass(frozen=True)
class Place:
    """Channels that parameters write and layers read.

    Attributes:
        writers: parameters whose first axis begins with these channels.
        readers: weights whose second axis are these channels.
        channels: their number.
    """

    writers: tuple[Tensor, ...]
    readers: tuple[Tensor, ...]
    channels: int


def plant_outliers(unet: nn.Module, *, factors: tuple[float, ...] = FACTORS, seed: int = 0) -> int:
    """Scale one channel by each factor at every place of a diffusers UNet, in place.

    Places are a transformer's norms (before query, key and value, before the query of cross-attention, before the
    feed-forward layer, and the group norm before the first projection), the values of both attentions, and the gated
    half of the feed-forward layer. A ResNet block has none: its SiLU is not homogeneous.

    Returns:
        The number of places.
    """
    generator = torch.Generator().manual_seed(seed)
    places = list(_places(unet))
    with torch.no_grad():
        for place in places:
            channels = torch.randperm(place.channels, generator=generator)[: len(factors)]
            for channel, factor in zip(channels.tolist(), factors, strict=False):
                for parameter in place.writers:
                    parameter[channel] *= factor
                for weight in place.readers:
                    weight[:, channel] /= factor
    return len(places)


def _places(unet: nn.Module) -> Iterator[Place]:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            yield _after_norm(module.norm, module.proj_in)
        if isinstance(module, BasicTransformerBlock):
            yield _after_norm(module.norm1, module.attn1.to_q, module.attn1.to_k, module.attn1.to_v)
            yield _after_norm(module.norm2, module.attn2.to_q)
            yield _after_norm(module.norm3, module.ff.net[0].proj)
            for attention in (module.attn1, module.attn2):
                yield _place(attention.to_v, attention.to_out[0])
            yield _place(module.ff.net[0].proj, module.ff.net[2])


def _after_norm(norm: nn.Module, *layers: nn.Module) -> Place:
    writers = tuple(norm.parameters())
    return Place(writers, tuple(_weight(layer) for layer in layers), len(writers[0]))


def _place(writer: nn.Module, reader: nn.Module) -> Place:
    weight = _weight(reader)
    return Place(tuple(writer.parameters()), (weight,), weight.shape[1])


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
