"""Writes checkpoints in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sdc.compiler.load.checkpoint import Checkpoint


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, *, unet: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
) -> None:
    """Write all parts, in float32, with LoRAs folded in.

    Text encoders get the names that transformers 4 and 5 both read.

    Args:
        checkpoint: what to write.
        folder: is made if need be.
        unet: configuration and weights to write in place of the checkpoint's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.vae().save_pretrained(folder / "vae")
    if unet is None:
        checkpoint.unet().save_pretrained(folder / "unet")
    else:
        _save_network(folder / "unet", *unet)
    text_encoder = checkpoint.text_encoder()
    text_encoder.config.save_pretrained(folder / "text_encoder")
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": weight.contiguous()
        for name, weight in text_encoder.state_dict().items()
    }
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    for name, content in checkpoint.tokenizer_files.items():
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / name).write_bytes(content)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(checkpoint.scheduler_config), indent=2))
    (folder / "model_index.json").write_text(json.dumps(dict(checkpoint.model_index), indent=2))


def _save_network(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    contiguous = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
