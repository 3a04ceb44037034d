"""The same weights and the same inputs for every side, in files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers.environments import SetUpError
from sdc.engines.bundle import open_bundle
from sdc.engines.noise import noise_from_seeds
from sdc.engines.specs import SHALLOW
from sdc.engines.tokenizer import load_tokenizer

PROMPT = "a photo of a red dress on a white background"


@dataclass(frozen=True)
class Architecture:
    """A model whose weights need no download.

    Attributes:
        model: as `sdc export` names it.
        weights: "random" or "trained".
        needed_bytes: on the disk, for all that sides make and for their environments.
        guidance_scale: of pictures.
    """

    model: str
    weights: str
    needed_bytes: int
    guidance_scale: float = 5.0


ARCHITECTURES = {
    "sd15": Architecture("sd15", "random", 30 << 30),
    "tiny": Architecture("tiny", "trained", 5 << 30),
}
"""tiny is for trying the script out; stable-diffusion.cpp does not know its sizes."""

SEED = 0
BATCH = 2
"""Rows of a step with guidance."""


def check_room(folder: Path, needed_bytes: int) -> None:
    """See that the disk holds what is going to be made.

    Raises:
        SetUpError: it does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        found = f"{free / 2**30:.0f} GiB are free below {folder}"
        raise SetUpError(f"expected {needed_bytes / 2**30:.0f} GiB on the disk, {found}; give another --work")


def link_bundle(made: Path, name: str, bundle: Path, architecture: Architecture) -> None:
    """Let sdc's sides use a bundle that is there already, in place of one that was given before.

    Args:
        made: folder of what sides have made.
        name: precision of the bundle, with "-deepcache" if it has a shallow UNet.
        bundle: its folder.
        architecture: of all sides.

    Raises:
        SetUpError: it is a bundle of another model or precision, or has no shallow UNet where it should; or the sides
            have exported one of their own.
    """
    manifest = open_bundle(bundle).manifest
    shallow = "-deepcache" if SHALLOW in manifest.components else ""
    found = (manifest.model.name, manifest.model.weights.partition(",")[0], f"{manifest.precision}{shallow}")
    wanted = (architecture.model, architecture.weights, name)
    if found != wanted:
        raise SetUpError(f"expected a bundle of {', '.join(wanted)}, found {', '.join(found)} in {bundle}")
    place = made / f"sdc-{name}" / "bundle"
    if place.exists() and not place.is_symlink():
        raise SetUpError(f"expected no bundle in {place} beside the given {bundle}; leave out --bundles, or remove it")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(bundle)


def picture_settings(architecture: Architecture, checkpoint: Path) -> dict[str, Any]:
    """What all sides draw."""
    return {
        "prompt": PROMPT,
        "seed": SEED,
        "guidance_scale": architecture.guidance_scale,
        "size_px": latent_size(checkpoint) * vae_reduction(checkpoint),
    }


def write_inputs(checkpoint: Path, path: Path) -> None:
    """Inputs of every component, drawn from a seed, and the tokens and the noise of the picture."""
    generator = np.random.default_rng(SEED)
    unet, text = (read_config(checkpoint, part) for part in ("unet", "text_encoder"))
    channels, size = unet["in_channels"], latent_size(checkpoint)
    tokenizer = load_tokenizer(checkpoint / "tokenizer", max_tokens=text["max_position_embeddings"])
    tokens = tokenizer.encode(["", PROMPT])
    hidden = (BATCH, text["max_position_embeddings"], unet["cross_attention_dim"])
    np.savez(
        path,
        **{
            "unet.sample": generator.standard_normal((BATCH, channels, size, size), np.float32),
            "unet.timestep": np.array([501], np.float32),
            "unet.encoder_hidden_states": generator.standard_normal(hidden, np.float32),
            "vae_decoder.latent_sample": generator.standard_normal((1, channels, size, size), np.float32),
            "text_encoder.input_ids": tokens,
            "picture.input_ids": tokens,
            "picture.latents": noise_from_seeds([SEED])((1, channels, size, size)),
        },
    )


def read_config(checkpoint: Path, part: str) -> dict[str, Any]:
    """A network's configuration."""
    config: dict[str, Any] = json.loads((checkpoint / part / "config.json").read_text(encoding="utf-8"))
    return config


def latent_size(checkpoint: Path) -> int:
    """The size that the UNet was made for."""
    return int(read_config(checkpoint, "unet")["sample_size"])


def vae_reduction(checkpoint: Path) -> int:
    """Pixels for a latent."""
    return 2 ** (len(read_config(checkpoint, "vae")["block_out_channels"]) - 1)
