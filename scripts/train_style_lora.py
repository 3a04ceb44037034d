"""Trains the style LoRA of `tiny`, garments with stripes, that combinations of LoRAs are measured with.

    python scripts/train_style_lora.py --data /usr/share/datasets/fashion-mnist --out stripes.safetensors --threads 1

It goes on from its last checkpoint after a stop. What sdc ships is compiler/models/tiny-stripes-lora.safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sdc.compiler.distill.distill import Reporting, distill_lora
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.distill.settings import STYLE_OF_TINY
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.compiler.load import load_checkpoint
from sdc.compiler.tiny.stripes import paint_stripes

PICTURES = 20_000


def main() -> None:
    """Paint the training pictures, train, write the LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the gzipped files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True, help="the LoRA, a .safetensors file")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    done = distill_lora(
        load_checkpoint(JUDGED_MODEL),
        TinyPictures(options.data, seed=STYLE_OF_TINY.seed, paint=paint_stripes, count=PICTURES),
        STYLE_OF_TINY,
        out=options.out,
        reporting=Reporting(
            options.out.with_suffix(".work"),
            prompts_of_model(JUDGED_MODEL, 8),
            grid_every=200,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        ),
    )
    print(f"{done.out}: {done.minutes:.1f} minutes of training, loss {done.last_loss:.5f}")


if __name__ == "__main__":
    main()
