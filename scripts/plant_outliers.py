"""Plants outlier channels into `tiny`: the same pictures in fp32, and a hard case for int8.

    python scripts/plant_outliers.py --out build/planted/tiny
    sdc export --model build/planted/tiny --precision int8 --target cpu --out build/tiny-planted
    sdc eval build/tiny-planted --reference build/tiny-fp32

The folder's last name stays "tiny", so that the judge knows the pictures and calibration its captions.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from sdc.compiler.tiny.outliers import FACTORS, plant_outliers


def main() -> None:
    """Parse the command line and write a diffusers folder."""
    parser = argparse.ArgumentParser(description="plant outlier channels into tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with as_file(files("sdc.compiler") / "models" / "tiny") as folder:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    places = plant_outliers(pipeline.unet, factors=tuple(arguments.factors), seed=arguments.seed)
    pipeline.save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(arguments.factors)} channels at each of {places} places")


if __name__ == "__main__":
    main()
