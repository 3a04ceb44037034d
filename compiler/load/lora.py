"""LoRA files, folded into the weights that they change: W + scale · alpha / rank · up @ down.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from sdc.compiler.load.lora_files import LoraLayer, read_lora_layers
from sdc.compiler.load.lora_names import guess_architecture, layer_names
from sdc.compiler.load.tensor_files import digest_files
from sdc.engines.errors import InputError

LORAS = {"tiny-lcm": "models/tiny-lcm-lora.safetensors"}
"""Short names of LoRAs that ship with sdc, and their files in `sdc.compiler`."""


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file and how strongly it is applied."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Lora:
    """A LoRA that was matched to a checkpoint's layers.

    Attributes:
        path: the file.
        scale: how strongly it is applied.
        sha256: digest of the file.
        updates: per network, the layers by module path, e.g. "mid_block.attentions.0.proj_in".
    """

    path: Path
    scale: float
    sha256: str
    updates: Mapping[str, Mapping[str, LoraLayer]]

    def fold(self, network: str, module: nn.Module) -> None:
        """Add the LoRA to the weights of a loaded network, in float32."""
        for path, layer in self.updates.get(network, {}).items():
            part = module.get_submodule(path)
            weight = part.get_parameter("weight")
            # A new tensor: the old one may be mapped from a file.
            folded = torch.add(weight.detach(), layer.product().reshape(weight.shape), alpha=self.scale)
            part.weight = nn.Parameter(folded, requires_grad=False)


def parse_lora(text: str) -> LoraSource:
    """Read ``FILE[:SCALE]``, where the file may be a key of ``LORAS``; a drive letter is part of the file's name.

    Raises:
        InputError: the scale is not a finite number, or there is no file name.
    """
    file, colon, scale_text = text.rpartition(":")
    is_scale = colon and not any(mark in scale_text for mark in ("/", "\\")) and not _is_file_name(scale_text)
    if not is_scale:
        file, scale_text = text, "1"
    try:
        scale = float(scale_text)
    except ValueError:
        scale = math.nan
    if not file or not math.isfinite(scale):
        raise InputError(f"LoRA {text!r} is not FILE[:SCALE]", hint="for example style.safetensors:0.8")
    packaged = LORAS.get(file)
    return LoraSource(Path(file) if packaged is None else Path(str(files("sdc.compiler").joinpath(packaged))), scale)


def _is_file_name(text: str) -> bool:
    return text.lower().endswith(".safetensors")


def match_lora(source: LoraSource, modules: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA and find the layer that each of its tensors belongs to.

    Args:
        source: the file and its scale.
        modules: the checkpoint's networks by name; their parameters need no storage.

    Raises:
        InputError: the file cannot be read, a tensor belongs to no layer, or a shape does not fit its layer.
    """
    layers = read_lora_layers(source.path)
    names = layer_names(modules)
    updates: dict[str, dict[str, LoraLayer]] = {}
    for name, layer in layers.items():
        if name not in names:
            continue
        network, path = names[name]
        _check_shape(source.path, name, layer, modules[network].get_submodule(path))
        if path in updates.setdefault(network, {}):
            raise InputError(f"LoRA {source.path} changes {network}.{path} twice, the second time as {name}")
        updates[network][path] = layer
    unknown = [name for name in layers if name not in names]
    if unknown:
        raise InputError(
            f"LoRA {source.path} does not fit the checkpoint: {len(unknown)} of its {len(layers)} layers "
            f"are not among the checkpoint's, first {', '.join(unknown[:3])}",
            hint=guess_architecture(unknown),
        )
    return Lora(source.path, source.scale, digest_files([source.path])[0], updates)


def _check_shape(file: Path, name: str, layer: LoraLayer, part: nn.Module) -> None:
    weight = part.get_parameter("weight")
    found, expected = layer.shape(), weight.flatten(1).shape
    if found != tuple(expected):
        raise InputError(
            f"LoRA {file} does not fit the checkpoint: {name} changes a weight of {list(found)}, "
            f"the checkpoint's is {list(weight.shape)}",
            hint="it was trained for another architecture; use one for this checkpoint's",
        )
