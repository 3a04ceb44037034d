"""Writes a model as a diffusers folder, for tools that read nothing else: random weights, or LoRAs, among its weights.

python scripts/save_checkpoint.py --model sd15 --weights random sd15-random

Text encoders get the names that transformers 4 and 5 both read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from sdc.compiler.load import Checkpoint, load_checkpoint, parse_lora


def main() -> None:
    """Load, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    loras = [parse_lora(each) for each in options.lora]
    save_checkpoint(load_checkpoint(options.model, weights=options.weights, loras=loras), options.folder)


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all parts, in float32."""
    for name in ("unet", "vae"):
        (checkpoint.unet if name == "unet" else checkpoint.vae)().save_pretrained(folder / name)
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


if __name__ == "__main__":
    main()
