"""Coloured Fashion-MNIST with captions: the data that `tiny` is trained and judged on.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv:1708.07747 (MIT licence), as packaged by Debian in
``dataset-fashion-mnist``. A grey picture becomes the opacity of one colour over a plain background.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.engines.errors import InputError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SIZE_PX = 32


@dataclass(frozen=True)
class GreyPictures:
    """Grey pictures with their classes.

    Attributes:
        pixels: [N, 28, 28], uint8, 0 is background.
        garments: [N], int64, indices into ``GARMENTS``.
    """

    pixels: np.ndarray
    garments: np.ndarray


def holds_grey_pictures(folder: Path) -> bool:
    """Whether a folder has the files that `load_grey_pictures` reads for training."""
    return _images(folder, "train").is_file()


def load_grey_pictures(folder: Path, split: str) -> GreyPictures:
    """Read one split ("train" or "t10k") of the gzipped IDX files.

    Raises:
        InputError: a file is missing or is not in IDX format.
    """
    pixels = _read_idx(_images(folder, split))
    garments = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return GreyPictures(pixels, garments)


def _images(folder: Path, split: str) -> Path:
    return folder / f"{split}-images-idx3-ubyte.gz"


def _read_idx(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(
            f"Fashion-MNIST file {path} not found",
            hint="install Debian's dataset-fashion-mnist, or unpack it and pass its folder with --data",
        )
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise InputError(f"{path} is not an IDX file of unsigned bytes", hint="fetch the package again")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def render(
    pixels: np.ndarray, colours: np.ndarray, backgrounds: np.ndarray, *, shift_px: np.ndarray | None = None
) -> torch.Tensor:
    """Colour grey pictures.

    Args:
        pixels: [N, 28, 28], uint8.
        colours: [N], indices into ``COLOURS``.
        backgrounds: [N], indices into ``BACKGROUNDS``.
        shift_px: [N, 2], displacement from the centre in -2..2; none when missing.

    Returns:
        [N, 3, 32, 32], float32 in [-1, 1].
    """
    opacity = np.zeros((len(pixels), IMAGE_SIZE_PX, IMAGE_SIZE_PX), np.float32)
    if shift_px is None:
        opacity[:, 2:30, 2:30] = pixels / np.float32(255)
    else:
        for i, (dy, dx) in enumerate(shift_px):
            opacity[i, 2 + dy : 30 + dy, 2 + dx : 30 + dx] = pixels[i] / np.float32(255)
    foreground = (np.array(list(COLOURS.values()), np.float32) / 127.5 - 1)[colours][:, :, None, None]
    background = (np.array(list(BACKGROUNDS.values()), np.float32) / 127.5 - 1)[backgrounds][:, :, None, None]
    return torch.from_numpy(background + opacity[:, None] * (foreground - background))
