"""Pictures whose latents are decoded in tiles, beside the same decoded whole.

    python scripts/tiles_compared.py build/tiny-int8 --size 128 --tile 64x128 64x64 --prompt "a red bag" "a coat"

PSNR is that of the decoder's output between black and white, of all pictures and of the worst one. Work is the area of
all tiles for that of the picture.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdc.compiler.text_table import markdown_row
from sdc.engines import load
from sdc.engines.measures import Measures
from sdc.engines.tiles import tile_starts

HEADS = ("tile, height x width", "tiles", "work", "PSNR, dB", "of the worst picture, dB", "seconds a picture")


def main() -> None:
    """Print a row for each size of tile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--size", type=int, required=True, metavar="PX")
    parser.add_argument("--tile", nargs="+", required=True, metavar="HxW")
    parser.add_argument("--prompt", nargs="+", default=["a photo of a red sneaker on a white background"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    with load(options.bundle, options.target) as pipe:
        generation = pipe.plan(
            options.prompt, steps=options.steps, seed=options.seed, height=options.size, width=options.size
        )
        latents = pipe.denoise(generation)
    print(markdown_row(*HEADS), markdown_row(*["---"] * len(HEADS)), sep="\n")
    whole: NDArray[np.float32] | None = None
    for text in (f"{options.size}x{options.size}", *options.tile):
        height, width = map(int, text.split("x"))
        with load(options.bundle, options.target) as pipe:  # compiled for this size
            measures = Measures(decoded_at_once=1, tile_px=(height, width))
            pipe.decode(latents[:1], measures=measures)
            begin = time.perf_counter()
            decoded = pipe.decode(latents, measures=measures)
            seconds = (time.perf_counter() - begin) / len(latents)
        whole = decoded if whole is None else whole
        count = len(tile_starts(options.size, height)) * len(tile_starts(options.size, width))
        work = f"{count * height * width / options.size**2:.2f}"
        ratios = [f"{psnr_db(decoded, whole):.1f}", f"{min(map(psnr_db, decoded, whole)):.1f}"]
        print(markdown_row(f"{height} x {width}", str(count), work, *ratios, f"{seconds:.2f}"), flush=True)


def psnr_db(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Of pictures from -1 to 1, clipped to that; infinite if they are equal."""
    error = float(np.mean((np.clip(found, -1, 1) - np.clip(wanted, -1, 1)) ** 2, dtype=np.float64))
    return math.inf if error == 0 else 10 * math.log10(4 / error)


if __name__ == "__main__":
    main()
