"""Pictures of a bundle on the target cpu, with the CPU kernels and without, beside those of a reference in fp32.

    sdc export --model tiny --precision int8 --target cpu --out build/tiny-int8
    sdc export --model tiny --precision fp32 --target cpu --out build/tiny-fp32
    python scripts/bench_kernels_in_pictures.py build/tiny-int8 --reference build/tiny-fp32 --size 128

At 32 pixels, tiny's own size, no attention is large enough for the kernels. Equal prompts and seeds; PSNR of each
picture: mean, median, least.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from bench_kernels_in_unet import SIDES

from sdc.compiler.evaluate.metrics import psnr
from sdc.compiler.evaluate.settings import prompts_of_model
from sdc.compiler.text_table import markdown_row
from sdc.engines import load

BATCH = 4
"""As many pictures at a time as tiny's engines take with guidance."""


def main() -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="in pixels")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    choices = (options.size, options.samples, options.steps)
    expected = draw(options.reference, *choices)
    print(markdown_row("side", "mean PSNR, dB", "median", "least"), markdown_row(*["---"] * 4), sep="\n")
    for side, switch in SIDES.items():
        os.environ["SDC_KERNELS"] = switch
        found = psnr(draw(options.bundle, *choices), expected, data_range=2.0)
        print(
            markdown_row(side, *(f"{each:.2f}" for each in (found.mean(), np.median(found), found.min()))), flush=True
        )


def draw(bundle: Path, size: int, samples: int, steps: int) -> np.ndarray:
    """[samples, 3, size, size] from -1 to 1, of seeds from 0 on."""
    prompts = prompts_of_model("tiny", samples)
    pictures = []
    with load(bundle, "cpu") as pipeline:
        for first in range(0, samples, BATCH):
            chosen = prompts[first : first + BATCH]
            seeds = list(range(first, first + len(chosen)))
            generation = pipeline.plan(chosen, steps=steps, guidance_scale=1.9, seed=seeds, height=size, width=size)
            pictures.append(pipeline.decode(pipeline.denoise(generation)))
    return np.concatenate(pictures)


if __name__ == "__main__":
    main()
