"""UNets of several families at small and distinct widths, with random weights, and fixed inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdc.compiler.compress.prune import UnetState

CONTEXT = 18

FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "upcast_attention": True},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "two transformers": {"transformer_layers_per_block": (1, 2)},
}
"""What differs from SD 1.x's configuration."""


def make_state(family: str = "sd1", *, seed: int = 5, layers: int = 1) -> UnetState:
    """Widths 24 and 48 in 6 norm groups, 3 heads of 8 and 16, as configuration and weights."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=5,
        out_channels=5,
        block_out_channels=(24, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=CONTEXT,
        attention_head_dim=3,
        norm_num_groups=6,
        **FAMILIES[family],
    )
    for parameter in unet.parameters():
        if parameter.ndim == 1:  # norms and biases unlike 1 and 0, so that leaving one out shows
            parameter.data += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    config = {"_class_name": "UNet2DConditionModel", **dict(unet.config)}
    return UnetState(config, {name: each.detach() for name, each in unet.state_dict().items()})


def inputs(*, seed: int = 3, rows: int = 3, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Sample [B, C, 10, 6], timesteps [B] and states [B, 7, D]."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, channels, 10, 6, generator=generator)
    states = torch.randn(rows, 7, CONTEXT, generator=generator)
    return sample, torch.tensor([9, 501, 999, 40, 700, 333])[:rows], states


@torch.no_grad()
def run(unet: UNet2DConditionModel, *, seed: int = 3) -> Tensor:
    """The prediction for the fixed inputs."""
    output: Tensor = unet(*inputs(seed=seed)).sample
    return output
