"""A grid of pictures to look at: a prompt in each row, the bundle's and the reference's pictures side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import Settings, prompts_of_model
from sdc.engines.picture import save_png

ROWS = 10
COLUMNS = 6
LABEL_WIDTH_PX = 330
LINE_HEIGHT_PX = 14
SMALLEST_PICTURE_PX = 64
GAP_PX = 4


def save_grid(path: Path, bundle: Path, reference: Path | None, settings: Settings) -> None:
    """Write the grid as PNG: `COLUMNS` seeds of the bundle, and the same of the reference to the right of them.

    Raises:
        InputError: the file cannot be written.
    """
    blocks = []
    prompts: list[str] = []
    for source, its in ((bundle, settings), (reference, settings.without_shortcuts())):
        if source is None:
            continue
        with opened(source, its) as made:
            prompts = prompts or prompts_of_model(made.manifest.model.name, ROWS)
            seeds = replace(settings, samples=ROWS * COLUMNS).picture_seeds()
            repeated = [prompt for prompt in prompts for _ in range(COLUMNS)]
            batch = made.largest_batch()
            parts = [
                made.make_pictures(repeated[i : i + batch], seeds[i : i + batch]) for i in range(0, len(seeds), batch)
            ]
            blocks.append(np.concatenate(parts).reshape(ROWS, COLUMNS, *parts[0].shape[1:]))
    save_png(draw_grid(prompts, blocks), path)


def draw_grid(prompts: list[str], blocks: list[np.ndarray]) -> Image.Image:
    """Lay out blocks of pictures [rows, columns, 3, H, W] in [0, 1] beside each other, to the right of the prompts."""
    _, columns, _, height, width = blocks[0].shape
    scale = max(1, -(-SMALLEST_PICTURE_PX // height))
    step_x, step_y = scale * width + GAP_PX, scale * height + GAP_PX
    block_width = columns * step_x + 3 * GAP_PX
    grid = Image.new("RGB", (LABEL_WIDTH_PX + len(blocks) * block_width, len(prompts) * step_y), (128, 128, 128))
    draw = ImageDraw.Draw(grid)
    for row, prompt in enumerate(prompts):
        for line, text in enumerate(_wrap(prompt)):
            draw.text((GAP_PX, row * step_y + GAP_PX + line * LINE_HEIGHT_PX), text, fill=(255, 255, 255))
        for index, block in enumerate(blocks):
            for column in range(columns):
                pixels = (block[row, column].transpose(1, 2, 0) * 255).round().astype(np.uint8)
                picture = Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST)
                grid.paste(picture, (LABEL_WIDTH_PX + index * block_width + column * step_x, row * step_y))
    return grid


def _wrap(text: str, characters: int = 50) -> list[str]:
    """Lines of whole words."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > characters and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
