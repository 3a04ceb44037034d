"""The interface of each component, from the configurations of its networks: names, shapes and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdc.engines.errors import InputError
from sdc.engines.manifest import PipelineSettings
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

UNET_BATCH = DimensionRange(1, 2, 8)
"""Guidance runs two samples a picture, so four pictures at once."""
TEXT_BATCH = DimensionRange(1, 2, 8)
VAE_BATCH = DimensionRange(1, 1, 4)

MINIMUM_LATENT, MAXIMUM_LATENT = 8, 32
"""Every range reaches at least from one to the other, however small the model's own size."""

Config = Mapping[str, Any]


def component_spec(name: str, configs: Mapping[str, Config]) -> ComponentSpec:
    """The interface of a component.

    Args:
        name: one of ``COMPONENTS``.
        configs: content of each network's ``config.json``: ``text_encoder``, ``unet``, ``vae``.

    Raises:
        InputError: the networks do not fit together.
    """
    _check_agreement(configs)
    makers = {
        "text_encoder": _text_encoder_spec,
        "unet": _unet_spec,
        "vae_decoder": _vae_decoder_spec,
        "vae_encoder": _vae_encoder_spec,
    }
    return makers[name](configs)


def pipeline_settings(configs: Mapping[str, Config]) -> PipelineSettings:
    """What the pipeline around the engines has to know."""
    vae, side = configs["vae"], latent_range(configs).optimum
    reduction = vae_reduction(vae)
    return PipelineSettings(
        vae_scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        vae_shift_factor=float(vae.get("shift_factor") or 0.0),
        vae_reduction=reduction,
        latent_channels=_latent_channels(vae),
        default_height_px=side * reduction,
        default_width_px=side * reduction,
        max_tokens=_max_tokens(configs["text_encoder"]),
        time_cond_proj_dim=configs["unet"].get("time_cond_proj_dim"),
    )


def vae_reduction(vae: Config) -> int:
    """How many times smaller than the picture the latents are, along each side."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def latent_size(unet: Config) -> tuple[int, int]:
    """Height and width of the latents that a UNet is made for; where it names none, those of SD 1.x."""
    size = unet.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def latent_range(configs: Mapping[str, Config]) -> DimensionRange:
    """Sizes of a side of the latents: from half the UNet's own to twice; every level of the UNet halves it exactly."""
    unet = configs["unet"]
    multiple = int(2 ** (len(unet["block_out_channels"]) - 1))
    optimum = max(multiple, min(latent_size(unet)) // multiple * multiple)

    def rounded_up(value: int) -> int:
        return math.ceil(value / multiple) * multiple

    return DimensionRange(
        minimum=min(optimum, rounded_up(max(optimum // 2, MINIMUM_LATENT))),
        optimum=optimum,
        maximum=rounded_up(max(2 * optimum, MAXIMUM_LATENT)),
        multiple=multiple,
    )


def _text_encoder_spec(configs: Mapping[str, Config]) -> ComponentSpec:
    config = configs["text_encoder"]
    tokens, width = _max_tokens(config), int(config["hidden_size"])
    return ComponentSpec(
        name="text_encoder",
        inputs=(TensorSpec("input_ids", "int64", ("B", tokens)),),
        outputs=(
            TensorSpec("last_hidden_state", "float32", ("B", tokens, width)),
            TensorSpec("pooler_output", "float32", ("B", width)),
        ),
        dimensions={"B": TEXT_BATCH},
    )


def _unet_spec(configs: Mapping[str, Config]) -> ComponentSpec:
    config, side = configs["unet"], latent_range(configs)
    text = ("B", _max_tokens(configs["text_encoder"]), int(config["cross_attention_dim"]))
    inputs = [
        TensorSpec("sample", "float32", ("B", int(config["in_channels"]), "H", "W")),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", text),
    ]
    if config.get("time_cond_proj_dim") is not None:
        inputs.append(TensorSpec("timestep_cond", "float32", ("B", int(config["time_cond_proj_dim"]))))
    return ComponentSpec(
        name="unet",
        inputs=tuple(inputs),
        outputs=(TensorSpec("out_sample", "float32", ("B", int(config["out_channels"]), "H", "W")),),
        dimensions={"B": UNET_BATCH, "H": side, "W": side},
    )


def _vae_decoder_spec(configs: Mapping[str, Config]) -> ComponentSpec:
    latent, picture, dimensions = _vae_shapes(configs)
    return ComponentSpec(
        name="vae_decoder",
        inputs=(TensorSpec("latent_sample", "float32", latent),),
        outputs=(TensorSpec("sample", "float32", picture),),
        dimensions=dimensions,
    )


def _vae_encoder_spec(configs: Mapping[str, Config]) -> ComponentSpec:
    latent, picture, dimensions = _vae_shapes(configs)
    moments = (latent[0], 2 * _latent_channels(configs["vae"]), *latent[2:])
    return ComponentSpec(
        name="vae_encoder",
        inputs=(TensorSpec("sample", "float32", picture),),
        outputs=(TensorSpec("latent_parameters", "float32", moments),),
        dimensions=dimensions,
    )


Shape = tuple[int | str, ...]


def _vae_shapes(configs: Mapping[str, Config]) -> tuple[Shape, Shape, dict[str, DimensionRange]]:
    """Shapes of latents and pictures, and the ranges of their sizes; pictures are `vae_reduction` times as large."""
    vae, side = configs["vae"], latent_range(configs)
    factor = vae_reduction(vae)
    side_px = DimensionRange(
        side.minimum * factor, side.optimum * factor, side.maximum * factor, side.multiple * factor
    )
    return (
        ("B", _latent_channels(vae), "H", "W"),
        ("B", int(vae.get("out_channels", 3)), "H_px", "W_px"),
        {"B": VAE_BATCH, "H": side, "W": side, "H_px": side_px, "W_px": side_px},
    )


def _latent_channels(vae: Config) -> int:
    return int(vae.get("latent_channels", 4))


def _max_tokens(text_encoder: Config) -> int:
    return int(text_encoder.get("max_position_embeddings", 77))


def _check_agreement(configs: Mapping[str, Config]) -> None:
    unet, width = configs["unet"], configs["text_encoder"]["hidden_size"]
    if unet["cross_attention_dim"] != width:
        raise InputError(
            f"the UNet attends to vectors of {unet['cross_attention_dim']} values and the text encoder gives {width}",
            hint="take both from the same checkpoint",
        )
    if unet["in_channels"] != _latent_channels(configs["vae"]):
        latent_channels = _latent_channels(configs["vae"])
        raise InputError(
            f"the UNet takes {unet['in_channels']} channels and the VAE's latents have {latent_channels}",
            hint="inpainting and other UNets with extra channels are not supported yet",
        )
