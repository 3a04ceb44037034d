"""From what a user calls a model to an opened checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from sdc.compiler.load.checkpoint import Checkpoint, Weights
from sdc.compiler.load.folder import open_folder, open_shipped
from sdc.compiler.load.lora import LoraSource, match_lora
from sdc.compiler.load.networks import make_empty
from sdc.compiler.load.tensor_files import refuse_pickle
from sdc.engines.errors import InputError

log = logging.getLogger(__name__)


def load_checkpoint(
    model: str,
    *,
    weights: Weights = "trained",
    seed: int = 0,
    loras: Sequence[LoraSource] = (),
) -> Checkpoint:
    """Open a model and check that it is whole; its weights are loaded when a network is asked for.

    Args:
        model: ``tiny``, ``sd15``, a folder in diffusers' layout.
        weights: "random" takes the architecture with seeded random weights and downloads none.
        seed: of the random weights.
        loras: folded into the weights; several add up.

    Raises:
        InputError: the model is unknown, damaged or not supported, or a LoRA does not fit it.
    """
    checkpoint = _open(model, seed if weights == "random" else None)
    checkpoint.check()
    if not loras:
        return checkpoint
    modules = {
        name: make_empty(name, source.config, origin=checkpoint.source) for name, source in checkpoint.networks.items()
    }
    return dataclasses.replace(checkpoint, loras=tuple(match_lora(lora, modules) for lora in loras))


def _open(model: str, seed: int | None) -> Checkpoint:
    path = Path(model)
    if model == "tiny":
        return open_folder(_package_folder("sdc.compiler", "models/tiny"), name="tiny", source="tiny", seed=seed)
    if model == "sd15" and seed is not None:
        return open_shipped("sd15", seed=seed)
    if path.is_dir():
        return open_folder(path, name=path.resolve().name, source=str(path), seed=seed)
    refuse_pickle(path)
    raise InputError(f"unknown model {model!r}")


def _package_folder(package: str, path: str) -> Path:
    folder = Path(str(files(package).joinpath(path)))
    if not folder.is_dir():
        raise InputError(f"sdc was installed without {path}", hint="install it again from a whole wheel or checkout")
    return folder
