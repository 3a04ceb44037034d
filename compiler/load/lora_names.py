"""The names that LoRA files give to the layers of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

_OLD_ATTENTION_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""What diffusers once called the projections of the text encoder."""


def layer_names(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every known name of every layer that a LoRA can change, with its network and module path.

    The names are made from the checkpoint's own layers, so a name that is not among them belongs to another
    architecture; no name is taken apart by guessing.
    """
    names: dict[str, tuple[str, str]] = {}
    for network, module in modules.items():
        spell = {"unet": _unet_names, "text_encoder": _text_encoder_names}.get(network)
        if spell is None:
            continue
        for path, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                names.update((name, (network, path)) for name in spell(path))
    return names


def _unet_names(path: str) -> Iterator[str]:
    yield f"unet.{path}"
    yield f"base_model.model.{path}"
    yield "lora_unet_" + path.replace(".", "_")
    block, attention, projection = path.rpartition(".to_")
    if attention:
        yield f"unet.{block}.processor.to_{projection.removesuffix('.0')}"


def _text_encoder_names(path: str) -> Iterator[str]:
    path = path.removeprefix("text_model.")
    for prefix in ("", "text_model."):
        yield f"text_encoder.{prefix}{path}"
        yield f"base_model.model.{prefix}{path}"
    yield "lora_te_text_model_" + path.replace(".", "_")
    yield "lora_te1_text_model_" + path.replace(".", "_")
    block, _, projection = path.rpartition(".")
    if projection in _OLD_ATTENTION_NAMES:
        yield f"text_encoder.text_model.{block}.{_OLD_ATTENTION_NAMES[projection]}"


def guess_architecture(names: Sequence[str]) -> str:
    """A hint about the checkpoint that layers of these names were trained for."""
    marks = {
        "lora_te2_": "Stable Diffusion XL",
        "text_encoder_2.": "Stable Diffusion XL",
        "input_blocks": "Stable Diffusion XL",
        "output_blocks": "Stable Diffusion XL",
        "double_blocks": "Flux",
        "single_transformer_blocks": "Flux",
        "joint_blocks": "Stable Diffusion 3",
    }
    for mark, architecture in marks.items():
        if any(mark in name for name in names):
            return f"the names are those of a LoRA for {architecture}; use one for this checkpoint's architecture"
    return "it was trained for another architecture; use one for this checkpoint's"
