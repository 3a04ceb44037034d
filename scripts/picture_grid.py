"""Draws a grid of pictures from a bundle, one row per garment and one column per colour.

python scripts/picture_grid.py build/tiny-int8 --out build/demo.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from sdc.engines import load

GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SCALE = 2
LABEL_WIDTH_PX = 64
LABEL_HEIGHT_PX = 14


def main() -> None:
    """Parse the command line, draw, and save one PNG."""
    parser = argparse.ArgumentParser(description="draw a grid of pictures from a bundle of tiny")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"))
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--target", default=None)
    arguments = parser.parse_args()
    pipe = load(arguments.bundle, target=arguments.target)
    rows = []
    for row, garment in enumerate(GARMENTS):
        prompts = [
            f"a photo of a {colour} {garment} on a {'black' if (row + column) % 2 else 'white'} background"
            for column, colour in enumerate(COLOURS)
        ]
        rows.append(
            [
                image
                for begin in range(0, len(prompts), 4)
                for image in pipe(
                    prompts[begin : begin + 4],
                    sampler=arguments.sampler,
                    steps=arguments.steps,
                    guidance_scale=arguments.guidance,
                    seed=[arguments.seed + row * len(COLOURS) + begin + i for i in range(4)],
                )
            ]
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    paste_grid(rows).save(arguments.out)
    print(f"{arguments.out}: {len(GARMENTS)} garments in {len(COLOURS)} colours")


def paste_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Paste equally large pictures with the names of rows and columns beside them."""
    width, height = (size * SCALE for size in rows[0][0].size)
    grid = Image.new("RGB", (LABEL_WIDTH_PX + width * len(COLOURS), LABEL_HEIGHT_PX + height * len(GARMENTS)), "grey")
    draw = ImageDraw.Draw(grid)
    for column, colour in enumerate(COLOURS):
        draw.text((LABEL_WIDTH_PX + column * width + 4, 1), colour, fill="white")
    for row, images in enumerate(rows):
        draw.text((4, LABEL_HEIGHT_PX + row * height + height // 2 - 6), GARMENTS[row], fill="white")
        for column, image in enumerate(images):
            corner = (LABEL_WIDTH_PX + column * width, LABEL_HEIGHT_PX + row * height)
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    return grid


if __name__ == "__main__":
    main()
