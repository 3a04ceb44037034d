"""Interfaces follow from configurations."""

from __future__ import annotations

from typing import Any

import pytest

from sdc.compiler.trace.interfaces import component_spec, latent_range, pipeline_settings, vae_reduction
from sdc.engines.errors import InputError
from sdc.engines.specs import COMPONENTS, ComponentSpec, DimensionRange

SD15: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77, "vocab_size": 49408},
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "time_cond_proj_dim": None,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "out_channels": 3},
}


def changed(network: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**SD15, network: {**SD15[network], **values}}


def test_sd15_has_the_ranges_of_the_documentation() -> None:
    unet = component_spec("unet", SD15)
    assert [tensor.name for tensor in unet.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert [tensor.shape for tensor in unet.inputs] == [("B", 4, "H", "W"), (1,), ("B", 77, 768)]
    assert unet.dimensions == {
        "B": DimensionRange(1, 2, 8),
        "H": DimensionRange(32, 64, 128, 8),
        "W": DimensionRange(32, 64, 128, 8),
    }
    decoder = component_spec("vae_decoder", SD15)
    assert decoder.outputs[0].shape == ("B", 3, "H_px", "W_px")
    assert decoder.dimensions["H_px"] == DimensionRange(256, 512, 1024, 64)
    encoder = component_spec("vae_encoder", SD15)
    assert encoder.outputs[0].shape == ("B", 8, "H", "W")
    settings = pipeline_settings(SD15)
    assert (settings.default_height_px, settings.vae_reduction, settings.vae_scaling_factor) == (512, 8, 0.18215)
    assert settings.time_cond_proj_dim is None


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_size_has_a_range_and_the_interface_survives_json(name: str) -> None:
    spec = component_spec(name, changed("unet", time_cond_proj_dim=256))
    symbols = {size for tensor in (*spec.inputs, *spec.outputs) for size in tensor.shape if isinstance(size, str)}
    assert symbols <= spec.dimensions.keys()
    assert ComponentSpec.from_json(spec.to_json()) == spec


def test_guidance_is_an_input_where_the_unet_embeds_it() -> None:
    spec = component_spec("unet", changed("unet", time_cond_proj_dim=256))
    assert (spec.inputs[-1].name, spec.inputs[-1].shape) == ("timestep_cond", ("B", 256))


@pytest.mark.parametrize(
    ("sample_size", "levels", "expected"),
    [
        (8, 3, DimensionRange(8, 8, 32, 4)),
        (96, 4, DimensionRange(48, 96, 192, 8)),
        (10, 4, DimensionRange(8, 8, 32, 8)),
        (10, 2, DimensionRange(8, 10, 32, 2)),
        ([40, 64], 3, DimensionRange(20, 40, 80, 4)),
        (None, 4, DimensionRange(32, 64, 128, 8)),
    ],
)
def test_latents_range_around_the_models_own_size(sample_size: Any, levels: int, expected: DimensionRange) -> None:
    assert latent_range(changed("unet", sample_size=sample_size, block_out_channels=[32] * levels)) == expected


def test_the_vae_halves_between_its_blocks() -> None:
    assert [vae_reduction({"block_out_channels": [8] * levels}) for levels in (1, 3, 4)] == [1, 4, 8]


@pytest.mark.parametrize(
    ("network", "values", "message"),
    [
        ("unet", {"cross_attention_dim": 1024}, "1024 values and the text encoder gives 768"),
        ("unet", {"in_channels": 9}, "takes 9 channels and the VAE's latents have 4"),
    ],
)
def test_networks_that_do_not_fit_are_refused(network: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        component_spec("vae_decoder", changed(network, **values))
