"""Writes pipelines in the layout of the original Stable Diffusion code: the inverse of what sdc reads.

Source: ``scripts/convert_diffusers_to_original_stable_diffusion.py`` of diffusers.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's tensors, for four blocks of two layers."""
    return {f"model.diffusion_model.{_unet_name(name)}": tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str) -> str:
    for new, old in _UNET_TOP.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        return f"input_blocks.{3 * block + layer + 1}.{_layer(kind, rest)}"
    if match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_layer(match[1], match[3])[2:]}"
    if match := re.match(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        return f"output_blocks.{3 * block + layer}.{_layer(kind, rest)}"
    match = re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name)
    assert match is not None, name
    return f"output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' else 2}.{match[2]}"


def _layer(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    part, _, parameter = rest.rpartition(".")
    return f"0.{_UNET_RESNET[part]}.{parameter}"


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    """The autoencoder's tensors, for four blocks; the attention's projections are 1x1 convolutions there."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        old = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        old = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", old)
        old = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", old)
        old = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", old)
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "mid_block.attentions.0." in old:
            old = old.replace("mid_block.attentions.0.", "mid.attn_1.")
            for new_part, old_part in _VAE_ATTENTION.items():
                old = old.replace(f".{new_part}.", f".{old_part}.")
            tensor = tensor[:, :, None, None].contiguous() if tensor.ndim == 2 else tensor
        tensors[f"first_stage_model.{old}"] = tensor
    return tensors


def original_clip(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The text encoder's tensors as in SD 1.x, with the buffer that old files carry."""
    prefix = "cond_stage_model.transformer.text_model."
    tensors = {prefix + name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    return {**tensors, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def original_open_clip(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The text encoder's tensors as in SD 2.x: OpenCLIP's names, and one matrix for query, key and value."""
    weights = {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    width = weights["embeddings.token_embedding.weight"].shape[1]
    tensors = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": torch.eye(width),
        "logit_scale": torch.tensor(4.6),
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    for layer in sorted({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}):
        new, old = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for new_part, old_part in parts.items():
                tensors[f"{old}.{old_part}.{kind}"] = weights[f"{new}.{new_part}.{kind}"]
            joined = [weights[f"{new}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{old}.attn.in_proj_{kind}"] = torch.cat(joined)
    return {f"cond_stage_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
