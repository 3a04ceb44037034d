"""Writes a model as a diffusers folder, for tools that read nothing else: random weights, or LoRAs, among its weights.

python scripts/save_checkpoint.py --model sd15 --weights random sd15-random
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdc.compiler.load import load_checkpoint, parse_lora
from sdc.compiler.load.save import save_checkpoint


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


if __name__ == "__main__":
    main()
