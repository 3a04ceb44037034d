"""The networks of other Stable Diffusion families at reduced width, with random weights, as exporters get them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TOKENS = 77


@dataclass(frozen=True)
class Network:
    """A module with what it takes to export it.

    Attributes:
        module: takes the inputs in order.
        inputs: example inputs by name.
        outputs: names of the outputs.
        free: per input, its free axes and their symbols.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    free: dict[str, dict[int, str]]


class _Unet(nn.Module):
    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class _UnetWithConditions(_Unet):
    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.network(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return output


def sd2_unet(*, seed: int = 5) -> Network:
    """Stable Diffusion 2.1 at a fifth of its width and half its depth: heads of 64, linear projections, v-prediction.

    What is predicted is the sampler's affair: the graph is the same.
    """
    torch.manual_seed(seed)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=96,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        upcast_attention=True,
    )
    return _network(_Unet(_with_random_norms(network)), context=96)


def sdxl_unet(*, seed: int = 6) -> Network:
    """Stable Diffusion XL at a fifth of its width: several layers a block, added conditions, heads of 64."""
    torch.manual_seed(seed)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=80,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
    )
    found = _network(_UnetWithConditions(_with_random_norms(network)), context=80)
    found.inputs.update(text_embeds=torch.randn(2, 40), time_ids=torch.rand(2, 6) * 100)
    found.free.update(text_embeds={0: "B"}, time_ids={0: "B"})
    return found


def _network(module: nn.Module, *, context: int) -> Network:
    inputs = {
        "sample": torch.randn(2, 4, 16, 24),
        "timestep": torch.tensor([501.0]),
        "encoder_hidden_states": torch.randn(2, TOKENS, context),
    }
    free = {"sample": {0: "B", 2: "H", 3: "W"}, "encoder_hidden_states": {0: "B"}}
    return Network(module.eval(), inputs, ("out_sample",), free)


def _with_random_norms(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """Norms and biases unlike 1 and 0, so that leaving one out shows."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    return network
