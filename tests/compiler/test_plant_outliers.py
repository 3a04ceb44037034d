"""Outlier channels planted into a torch UNet: the same function, and channels that are far above the others."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from reduced_networks import sd2_unet
from torch import nn

from sdc.compiler.tiny.outliers import plant_outliers

NETWORK = sd2_unet()


@pytest.fixture
def network() -> nn.Module:
    return copy.deepcopy(NETWORK.module)


def run(unet: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(*NETWORK.inputs.values())


def test_function_is_the_same(network: nn.Module):
    planted = copy.deepcopy(network)
    places = plant_outliers(planted, seed=3)
    assert places >= 7
    before, after = run(network), run(planted)
    assert (after - before).abs().max() <= 5e-5 * before.abs().max()


def test_one_channel_of_each_norm_is_multiplied(network: nn.Module):
    planted = copy.deepcopy(network)
    plant_outliers(planted, factors=(50.0,))
    blocks = [
        (old, new)
        for old, new in zip(network.modules(), planted.modules(), strict=True)
        if isinstance(old, BasicTransformerBlock)
    ]
    assert blocks
    for old, new in blocks:
        for name in ("norm1", "norm2", "norm3"):
            ratios = getattr(new, name).weight / getattr(old, name).weight
            assert sorted(ratios.tolist())[-2:] == pytest.approx([1, 50])
        columns = new.ff.net[2].weight / old.ff.net[2].weight
        assert (columns[0] < 0.5).sum() == 1
        assert columns.min().item() == pytest.approx(1 / 50)


def test_seed_decides_the_channels(network: nn.Module):
    twins = [copy.deepcopy(network) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        plant_outliers(twin, seed=seed)
    weights = [dict(twin.named_parameters()) for twin in twins]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def predict(unet: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs).sample


def largest_channels(unet: nn.Module, layer: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in each channel of the image that goes into a layer."""
    seen: list[torch.Tensor] = []
    with unet.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        predict(unet, inputs)
    return seen[0].abs().amax((0, 2, 3))


@pytest.mark.parametrize(
    ("layer", "together"), [("up_blocks.0.upsamplers.0.conv", 1), ("mid_block.resnets.0.norm2", 2)]
)
def test_images_in_convolutional_layers_have_outliers(layer: str, together: int):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=8,
        cross_attention_dim=16,
    )
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 500, "encoder_hidden_states": torch.randn(1, 5, 16)}
    before = largest_channels(unet, layer, inputs)
    result = predict(unet, inputs)
    plant_outliers(unet, factors=(10.0, 200.0))
    after = largest_channels(unet, layer, inputs)
    largest = (after / before).sort().values[-2 * together :]
    assert largest.tolist() == pytest.approx([10.0] * together + [200.0] * together, rel=1e-3)
    assert torch.allclose(predict(unet, inputs), result, rtol=0, atol=1e-4 * result.abs().max())
