"""Outlier channels, as large models grow them, planted into a UNet that has none; what it computes stays the same.

    (x · k) (W / k) = x W                  for a channel of x that a constant writes and the weight W reads
    GroupNorm(x · k) = GroupNorm(x)        for all channels of a group

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
        readers: weights whose second axis are these channels; none where a norm does not care how large a group is.
        channels: their number.
        together: adjacent channels that are scaled by one factor: 1, or a group of a norm.
    """

    writers: tuple[Tensor, ...]
    readers: tuple[Tensor, ...]
    channels: int
    together: int = 1


def plant_outliers(unet: nn.Module, *, factors: tuple[float, ...] = FACTORS, seed: int = 0) -> int:
    """Scale one channel by each factor at every place of a diffusers UNet, in place.

    Places are a transformer's norms (before query, key and value, before the query of cross-attention, before the
    feed-forward layer, and the group norm before the first projection, in Stable Diffusion 1 a convolution), the values
    of both attentions, the gated half of the feed-forward layer, the image before an upsampler's convolution where
    nothing but that reads it, and a ResNet block's first convolution with the timestep's projection. There the channels
    of a group of the norm that follows are scaled together: the norm takes that away, but for its epsilon. Between that
    norm and the second convolution stands a SiLU, which is not homogeneous.

    Returns:
        The number of places.
    """
    generator = torch.Generator().manual_seed(seed)
    places = list(_places(unet))
    with torch.no_grad():
        for place in places:
            chosen = torch.randperm(place.channels // place.together, generator=generator)[: len(factors)]
            for index, factor in zip(chosen.tolist(), factors, strict=False):
                channels = slice(index * place.together, (index + 1) * place.together)
                for parameter in place.writers:
                    parameter[channels] *= factor
                for weight in place.readers:
                    weight[:, channels] /= factor
    return len(places)


def _places(unet: nn.Module) -> Iterator[Place]:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.unets.unet_2d_blocks import UpBlock2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj and module.time_embedding_norm == "default":
            writers = (*module.conv1.parameters(), *module.time_emb_proj.parameters())
            norm = module.norm2
            yield Place(writers, (), norm.num_channels, together=norm.num_channels // norm.num_groups)
        if isinstance(module, UpBlock2D) and module.upsamplers:
            last = module.resnets[-1]
            yield _place(module.upsamplers[0].conv, last.conv2, last.conv_shortcut)
        if isinstance(module, Transformer2DModel):
            yield _after_norm(module.norm, module.proj_in)
        if isinstance(module, BasicTransformerBlock):
            yield _after_norm(module.norm1, module.attn1.to_q, module.attn1.to_k, module.attn1.to_v)
            yield _after_norm(module.norm2, module.attn2.to_q)
            yield _after_norm(module.norm3, module.ff.net[0].proj)
            for attention in (module.attn1, module.attn2):
                yield _place(attention.to_out[0], attention.to_v)
            yield _place(module.ff.net[2], module.ff.net[0].proj)


def _after_norm(norm: nn.Module, *layers: nn.Module) -> Place:
    writers = tuple(norm.parameters())
    return Place(writers, tuple(_weight(layer) for layer in layers), len(writers[0]))


def _place(reader: nn.Module, *writers: nn.Module) -> Place:
    weight = _weight(reader)
    parameters = tuple(parameter for writer in writers for parameter in writer.parameters())
    return Place(parameters, (weight,), weight.shape[1])


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
