"""LoRA files, folded into the weights that they change: W + scale · alpha / rank · up @ down.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sdc.compiler.load.lora_files import LoraLayer, read_lora_layers
from sdc.compiler.load.lora_names import guess_architecture, layer_names
from sdc.compiler.load.tensor_files import digest_files, read_metadata
from sdc.compiler.lora_argument import CONSISTENCY, DISTILLED, LoraSource
from sdc.engines.errors import InputError


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


def is_consistency_lora(path: Path) -> bool:
    """Whether a LoRA was distilled for few steps: `sdc distill` says so in the file, of others the name has to."""
    settings = json.loads(read_metadata(path).get(DISTILLED, "{}"))
    return settings.get("objective", CONSISTENCY) == CONSISTENCY if settings else "lcm" in path.name.lower()


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
