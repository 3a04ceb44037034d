"""Outlier channels planted into a torch UNet: the same function, and channels that are far above the others."""

from __future__ import annotations

import copy

import pytest
import torch
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
