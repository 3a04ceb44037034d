"""The three networks of a Stable Diffusion checkpoint: made empty from a configuration, then filled with weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdc.compiler.load.widths import WIDTHS, set_widths
from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

NETWORKS = ("text_encoder", "unet", "vae")
"""Names of the networks; also their folders in a checkpoint of diffusers' layout."""

CLASS_NAMES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""The one class of each network that can be compiled."""


def network_of(component: str) -> str:
    """The network that a component comes from: both halves of the autoencoder come from ``vae``.

    Raises:
        InputError: there is no such component.
    """
    network = "vae" if component in ("vae_decoder", "vae_encoder") else component
    if network not in NETWORKS:
        raise InputError(f"unknown component {component!r}", hint=f"known are {', '.join(NETWORKS)}")
    return network


def check_class(network: str, config: Mapping[str, Any], *, origin: str) -> None:
    """Raise if a configuration is for a class or a kind that is not supported.

    Raises:
        InputError: with the class that was found.
    """
    expected = CLASS_NAMES[network]
    found = config.get("_class_name") or (config.get("architectures") or [expected])[0]
    if found != expected:
        raise InputError(f"{network} of {origin} is a {found}; only {expected} is supported so far")
    if network != "unet":
        return
    for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
        if config.get(option) is not None:
            raise InputError(
                f"the UNet of {origin} has {option} = {config[option]!r}; only Stable Diffusion 1.x and 2.x, "
                "which have none, are supported so far"
            )


def check_agreement(configs: Mapping[str, Mapping[str, Any]], *, origin: str) -> None:
    """Raise unless the UNet takes the text encoder's states and the autoencoder's latents.

    Raises:
        InputError: with the two widths that differ.
    """
    unet, text_encoder, vae = (configs[network] for network in ("unet", "text_encoder", "vae"))
    for name, expected, of in (
        ("cross_attention_dim", text_encoder.get("hidden_size"), "the text encoder's states are"),
        ("in_channels", vae.get("latent_channels"), "the autoencoder's latents are"),
    ):
        if unet.get(name) != expected:
            raise InputError(
                f"the UNet of {origin} has {name} {unet.get(name)}, but {of} {expected} wide",
                hint="inpainting and other UNets with additional inputs are not supported so far",
            )


def make_empty(network: str, config: Mapping[str, Any], *, origin: str) -> nn.Module:
    """Build a network whose parameters have shapes but no storage; its layers have the widths of a pruned one.

    Raises:
        InputError: the configuration is for another class, or does not make sense to its class.
    """
    check_class(network, config, origin=origin)
    values = {name: value for name, value in config.items() if not name.startswith(("_", "sdc_"))}
    values.pop("dtype", None)
    values.pop("torch_dtype", None)
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module
            if network == "text_encoder":
                module = CLIPTextModel(CLIPTextConfig.from_dict(values))
            elif network == "unet":
                module = UNet2DConditionModel.from_config(values)
            else:
                module = AutoencoderKL.from_config(values)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the configuration of {network} in {origin} cannot be built: {error}") from error
    if WIDTHS in config:
        set_widths(module, config[WIDTHS], origin=origin)
    return module


def rename_old_names(network: str, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Give tensors the names that the installed libraries use.

    Text encoder: transformers 5 dropped the prefix ``text_model.``; older files carry a buffer and the projection
    of the whole CLIP. VAE: the attention's layers had other names and were 1x1 convolutions.
    """
    if network == "text_encoder":
        prefix = "text_model." if hasattr(module, "text_model") else ""
        unused = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
        bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        return {prefix + name: tensor for name, tensor in bare.items() if name not in unused}
    if network == "vae":
        return dict(_rename_vae_attention(name, tensor) for name, tensor in tensors.items())
    return dict(tensors)


def _rename_vae_attention(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if ".attentions." not in name:
        return name, tensor
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return name, tensor.flatten(1) if tensor.ndim == 4 else tensor


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str, hint: str) -> None:
    """Raise unless the tensors are exactly the module's parameters, by name and shape.

    Raises:
        InputError: names the first one that is missing, left over, or of another shape.
    """
    expected = module.state_dict()
    for name, parameter in expected.items():
        if name in tensors and tensors[name].shape != parameter.shape:
            raise InputError(
                f"{origin}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}", hint=hint
            )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(f"{origin}: {_count(missing)} missing, first {missing[0]}", hint=hint)
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise InputError(f"{origin}: {_count(unexpected)} unexpected, first {unexpected[0]}", hint=hint)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Give an empty module its weights in float32 and set it to inference; each tensor is converted on its own.

    Raises:
        InputError: a weight is not finite.
    """
    converted = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    for name, tensor in converted.items():
        # The sum is ten times faster; it is finite only if every value is.
        if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            raise InputError(f"{origin}: {name} holds NaN or infinity", hint="fetch or convert the weights again")
    module.load_state_dict(converted, strict=True, assign=True)
    module.requires_grad_(False).eval()
