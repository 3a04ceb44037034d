"""From the decoder's output to PNG files that say how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdc.engines.errors import InputError

JSON_KEY = "sdc"
"""PNG text chunk with the generation parameters as JSON."""

TEXT_KEY = "parameters"
"""PNG text chunk with the same as plain text, in the form that Stable Diffusion web interfaces read."""


def pixels_from_decoded(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pictures of 8 bits from the VAE decoder's output.

    Args:
        decoded: [N, 3, H, W], float32; -1 is black and 1 is white, and what lies beyond is clipped.

    Returns:
        [N, H, W, 3], uint8.
    """
    unit = np.clip(decoded / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    return (unit * 255).round().astype(np.uint8)


def images_from_pixels(pixels: NDArray[np.uint8], parameters: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """PIL images whose ``info`` holds the generation parameters, as `save_png` writes them.

    Args:
        pixels: [N, H, W, 3], uint8.
        parameters: JSON values, one mapping for each picture.
    """
    images = []
    for rows, values in zip(pixels, parameters, strict=True):
        image = Image.fromarray(rows)
        image.info[JSON_KEY] = json.dumps(values, ensure_ascii=False)
        image.info[TEXT_KEY] = _text(values)
        images.append(image)
    return images


def _text(values: Mapping[str, Any]) -> str:
    lines = [str(values["prompt"])]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    lines.append(
        f"Steps: {values['steps']}, Sampler: {values['sampler']}, CFG scale: {values['guidance_scale']}, "
        f"Seed: {values['seed']}, Size: {values['width']}x{values['height']}, Model: {values['model']}"
    )
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture with its generation parameters; `path` holds the old file or the whole new one, never a part.

    Raises:
        InputError: the file cannot be written.
    """
    text = PngInfo()
    for key in (JSON_KEY, TEXT_KEY):
        if key in image.info:
            text.add_text(key, str(image.info[key]))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        try:
            image.save(unfinished, "PNG", pnginfo=text)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
