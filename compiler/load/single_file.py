"""Checkpoints in one safetensors file, in the layout of the original Stable Diffusion code; nothing is downloaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from torch import Tensor, nn

from sdc.compiler.load.checkpoint import Checkpoint, WeightSource
from sdc.compiler.load.clip_tokenizer import clip_tokenizer_files
from sdc.compiler.load.folder import assemble, read_json, read_tokenizer, shipped_configs
from sdc.compiler.load.networks import NETWORKS, check_tensors, rename_old_names
from sdc.compiler.load.random_weights import RandomWeights
from sdc.compiler.load.tensor_files import digest_files, read_tensors
from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_PREFIXES = {
    "text_encoder": (_CLIP, _OPEN_CLIP),
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
}
"""What the names of a network's tensors begin with."""

_TRAINING_ONLY = "first_stage_model.loss."

_ARCHITECTURES = {"v1": "sd15", "v2": "sd2", "upscale": "sd15"}
"""diffusers' name of a kind of checkpoint, and the folder of configurations that ships for it.

It calls "upscale" all whose deepest block has a shortcut, SD 1.x of other widths among them; an upscaler itself is
refused by its shapes.
"""


@dataclass(frozen=True)
class OriginalWeights:
    """One network's weights in a file of the original layout.

    Attributes:
        file: the checkpoint.
        config: the network's configuration; the names follow from its numbers of blocks and layers.
    """

    file: Path
    config: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """The file."""
        return str(self.file)

    def check(self, network: str, module: nn.Module) -> None:
        """Raise InputError unless the file holds exactly the module's weights."""
        hint = "for another architecture than SD 1.x or 2.x give its configurations with --config FOLDER"
        check_tensors(module, self.read(network, module), origin=self.origin, hint=hint)

    def read(self, network: str, module: nn.Module) -> dict[str, Tensor]:
        """The weights under the module's own names, mapped from the file."""
        tensors = read_tensors(self.file, prefixes=_PREFIXES[network])
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TRAINING_ONLY)}
        if not tensors:
            raise InputError(
                f"{self.file} holds no {network}: no tensor begins with {' or '.join(_PREFIXES[network])}",
                hint="use a whole checkpoint of the original Stable Diffusion layout",
            )
        return rename_old_names(network, _convert(network, tensors, self.config, module), module)

    def fingerprint(self) -> str:
        """Digest of the file."""
        return json.dumps(["original", *digest_files([self.file])])


def open_single_file(file: Path, *, configs: Path | None = None, seed: int | None = None) -> Checkpoint:
    """Open a checkpoint in the original layout.

    Args:
        file: safetensors.
        configs: a folder in diffusers' layout, whose weights are not needed, for an architecture that is neither
            SD 1.x nor SD 2.x, or for another schedule or tokenizer than theirs.
        seed: take random weights of this seed; the file only tells the architecture.

    Raises:
        InputError: the file is damaged, is of another kind, or does not fit the configurations.
    """
    architecture = recognise(file)
    folder = configs or shipped_configs(architecture)
    weights: dict[str, WeightSource] = {
        network: OriginalWeights(file, read_json(folder / network / "config.json"))
        if seed is None
        else RandomWeights(seed)
        for network in NETWORKS
    }
    if configs is None and architecture == "sd2":
        log.warning(
            "%s does not say what it predicts; taken to predict v, as Stable Diffusion 2.1 does "
            "(for an epsilon model such as 2.1-base give its configurations with --config)",
            file,
        )
    return assemble(folder, name=file.stem, source=str(file), weights=weights, tokenizer_files=_tokenizer(folder))


def _tokenizer(configs: Path) -> dict[str, bytes]:
    """The tokenizer in a folder of configurations; CLIP's own where only its settings are given, or nothing."""
    folder = configs / "tokenizer"
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return read_tokenizer(folder)
    given = folder / "tokenizer_config.json"
    return clip_tokenizer_files(
        read_json(given if given.is_file() else shipped_configs("sd15") / "tokenizer" / given.name)
    )


def recognise(file: Path) -> str:
    """The architecture of a file: "sd15" or "sd2".

    Raises:
        InputError: it is neither, with what it is as far as that can be told.
    """
    tensors = read_tensors(file)
    kind = infer_diffusers_model_type(tensors)
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"{file} is a checkpoint of kind {kind}; only Stable Diffusion 1.x (v1) and 2.x (v2) are supported so far"
        )
    if not any(name.startswith(_PREFIXES["unet"]) for name in tensors):
        is_lora = any("lora" in name for name in tensors)
        raise InputError(
            f"{file} is no Stable Diffusion checkpoint: no tensor begins with {_PREFIXES['unet'][0]}",
            hint="it is a LoRA: give it with --lora" if is_lora else "a network alone belongs into a diffusers folder",
        )
    if any(name.startswith(_OPEN_CLIP) for name in tensors):
        return "sd2"
    return _ARCHITECTURES[kind]


def _convert(
    network: str, tensors: dict[str, Tensor], config: Mapping[str, Any], module: nn.Module
) -> dict[str, Tensor]:
    """Give tensors of the original layout the names and shapes of diffusers' layout, by diffusers' own converters."""
    if network == "text_encoder":
        if any(name.startswith(_OPEN_CLIP) for name in tensors):
            return dict(convert_open_clip_checkpoint(module, tensors, prefix=_OPEN_CLIP))
        return {name.removeprefix(_CLIP): tensor for name, tensor in tensors.items()}
    convert = convert_ldm_unet_checkpoint if network == "unet" else convert_ldm_vae_checkpoint
    converted = convert(tensors, config)
    # The converters pass over what they do not know; the check of names shall see it.
    used = {tensor.data_ptr() for tensor in converted.values()}
    return {**converted, **{name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in used}}
