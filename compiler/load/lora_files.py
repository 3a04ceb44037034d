"""LoRA files in the formats of kohya, diffusers and peft, read as layers of one form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdc.compiler.load.tensor_files import read_metadata, read_tensors
from sdc.engines.errors import InputError

_ROLES = {
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",  # diffusers, in the order of its history
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""What a tensor is to its layer, by the end of its name."""

_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    ".diff": "full weight differences",
    "on_input": "IA3",
    "bundle_emb": "a bundled textual inversion",
}
"""Marks in tensors' names of methods that are no plain LoRA."""

_DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank update of one layer.

    Attributes:
        down: [rank, inputs, ...].
        up: [outputs, rank, ...].
        mid: [rank, rank, height, width] between them where a convolution was decomposed further.
        factor: alpha / rank, or what the file says instead.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    factor: float

    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it changes, as a matrix [outputs, inputs · height · width]."""
        kernel = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return self.up.shape[0], self.down[0].numel() * kernel

    def product(self) -> Tensor:
        """factor · up @ down, float32, of the shape that `shape` gives."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is None:
            return up @ down * self.factor
        return torch.einsum("or,rshw,si->oihw", up, self.mid.float(), down).flatten(1) * self.factor


def read_lora_layers(path: Path) -> dict[str, LoraLayer]:
    """Read a LoRA file; names are the file's own, without what says down or up.

    Raises:
        InputError: the file cannot be read, holds another method than LoRA, or a layer is not whole.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(path).items():
        layer, role = _split(path, name)
        parts.setdefault(layer, {})[role] = tensor
    if not parts:
        raise InputError(f"LoRA {path} holds no tensor", hint="fetch it again")
    settings = _PeftSettings.read(path)
    return {name: _make_layer(path, name, tensors, settings) for name, tensors in parts.items()}


def _split(path: Path, name: str) -> tuple[str, str]:
    for mark, method in _OTHER_METHODS.items():
        if mark in name:
            raise InputError(
                f"{path} is no plain LoRA but holds {method} ({name})",
                hint="only LoRA (down and up matrices, for linear layers and convolutions) can be folded in so far",
            )
    for ending, role in _ROLES.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    raise InputError(f"{path} is no LoRA: tensor {name} is neither a down nor an up matrix nor an alpha")


def _make_layer(path: Path, name: str, tensors: Mapping[str, Tensor], settings: _PeftSettings) -> LoraLayer:
    for role in ("down", "up"):
        if role not in tensors:
            raise InputError(f"LoRA {path}: {name} has no {role} matrix", hint="fetch it again")
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    if min(down.ndim, up.ndim) < 2 or (mid is not None and mid.ndim != 4):
        raise InputError(
            f"LoRA {path}: {name} is {list(down.shape)} down and {list(up.shape)} up, which are no matrices"
        )
    rank = down.shape[0]
    if up.flatten(1).shape[1] != rank or (mid is not None and mid.shape[:2] != (rank, rank)):
        raise InputError(f"LoRA {path}: {name} has {list(down.shape)} down and {list(up.shape)} up, of unlike ranks")
    factor = float(tensors["alpha"]) / rank if "alpha" in tensors else settings.factor(name, rank)
    return LoraLayer(down, up, mid, factor)


@dataclass(frozen=True)
class _PeftSettings:
    """peft's settings of one file, by the prefix of the tensors that they are for; without any, alpha is the rank."""

    by_prefix: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _PeftSettings:
        """From the file's own metadata, where diffusers puts them, or the file that peft writes beside it."""
        packed = read_metadata(path).get(_DIFFUSERS_METADATA)
        beside = path.with_name("adapter_config.json")
        if packed:
            by_prefix: dict[str, dict[str, Any]] = {}
            for key, value in json.loads(packed).items():
                prefix, _, setting = key.partition(".")
                by_prefix.setdefault(prefix + ".", {})[setting] = value
            return cls(by_prefix)
        if path.name == "adapter_model.safetensors" and beside.is_file():
            return cls({"": json.loads(beside.read_text())})
        return cls({})

    def factor(self, name: str, rank: int) -> float:
        for prefix, settings in self.by_prefix.items():
            if name.startswith(prefix):
                alpha = settings.get("lora_alpha", rank)
                for pattern, value in (settings.get("alpha_pattern") or {}).items():
                    if re.match(rf"(.*\.)?({pattern})$", name):
                        alpha = value
                        break
                return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        return 1.0
