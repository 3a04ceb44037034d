"""From what a user calls a model to an opened checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import get_args

from sdc.compiler.load.checkpoint import Checkpoint, Weights
from sdc.compiler.load.folder import open_folder, open_shipped
from sdc.compiler.load.graph_folder import GraphCheckpoint, holds_graphs, open_graphs
from sdc.compiler.load.hub import is_hub_id, open_hub
from sdc.compiler.load.lora import match_lora
from sdc.compiler.load.networks import make_empty
from sdc.compiler.load.single_file import open_single_file
from sdc.compiler.load.tensor_files import refuse_pickle
from sdc.compiler.lora_argument import LoraSource
from sdc.engines.errors import InputError

ALIASES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""Short names of hub ids; their configurations ship with sdc."""


def load_model(
    model: str,
    *,
    weights: Weights = "trained",
    seed: int = 0,
    loras: Sequence[LoraSource] = (),
    configs: Path | None = None,
) -> Checkpoint | GraphCheckpoint:
    """Open a model for an export: what `load_checkpoint` opens, or a folder of ONNX graphs.

    Args:
        model: as for `load_checkpoint`, or a folder as optimum exports it.
        weights: likewise `seed`, `loras` and `configs`: as for `load_checkpoint`.

    Raises:
        InputError: see `load_checkpoint` and `open_graphs`.
    """
    path = Path(model)
    if model != "tiny" and path.is_dir() and holds_graphs(path):
        name = path.resolve().name
        return open_graphs(path, name=name, has_loras=bool(loras), random=weights == "random")
    return load_checkpoint(model, weights=weights, seed=seed, loras=loras, configs=configs)


def load_checkpoint(
    model: str,
    *,
    weights: Weights = "trained",
    seed: int = 0,
    loras: Sequence[LoraSource] = (),
    configs: Path | None = None,
) -> Checkpoint:
    """Open a model and check that it is whole; its weights are loaded when a network is asked for.

    Args:
        model: ``tiny``, ``sd15``, a hub id (``OWNER/NAME`` or ``OWNER/NAME@REVISION``), a folder in diffusers' layout,
            or a ``.safetensors`` file in the original Stable Diffusion layout.
        weights: "random" takes the architecture with seeded random weights and downloads none.
        seed: of the random weights.
        loras: folded into the weights; several add up.
        configs: for a single file of another architecture or schedule than SD 1.x and 2.x: a folder in diffusers'
            layout with its configurations.

    Raises:
        InputError: the model is unknown, damaged or not supported, or a LoRA does not fit it.
    """
    if weights not in get_args(Weights):
        raise InputError(f"unknown weights {weights!r}", hint=f"known are {', '.join(get_args(Weights))}")
    is_file = model.lower().endswith(".safetensors")
    if configs is not None and not is_file:
        raise InputError(f"{model} brings its own configurations", hint="give a folder of them for single files only")
    checkpoint = _open(model, seed if weights == "random" else None, configs)
    checkpoint.check()
    if not loras:
        return checkpoint
    modules = {
        name: make_empty(name, source.config, origin=checkpoint.source) for name, source in checkpoint.networks.items()
    }
    return dataclasses.replace(checkpoint, loras=tuple(match_lora(lora, modules) for lora in loras))


def _open(model: str, seed: int | None, configs: Path | None) -> Checkpoint:
    path = Path(model)
    if model == "tiny":
        return open_folder(_packaged_tiny(), name=model, source=model, seed=seed)
    if model in ALIASES:
        return open_hub(ALIASES[model], name=model) if seed is None else open_shipped(model, seed=seed)
    if path.is_dir():
        if holds_graphs(path):
            raise InputError(f"{path} holds engines or ONNX graphs, no weights", hint="give a folder with safetensors")
        return open_folder(path, name=path.resolve().name, source=str(path), seed=seed)
    refuse_pickle(path)
    if path.suffix.lower() == ".safetensors":
        return open_single_file(path, configs=configs, seed=seed)
    if is_hub_id(model):
        return open_hub(model, name=model, seed=seed)
    raise InputError(
        f"unknown model {model!r}: there is no such folder",
        hint=f"give tiny, {', '.join(ALIASES)}, a hub id OWNER/NAME, a diffusers folder or a .safetensors file",
    )


def _packaged_tiny() -> Path:
    folder = Path(str(files("sdc.compiler").joinpath("models/tiny")))
    if not folder.is_dir():
        raise InputError(f"sdc was installed without {folder}", hint="install it again from a whole wheel or checkout")
    return folder
