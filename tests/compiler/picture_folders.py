"""Folders of pictures with captions, as training takes them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_plain_pictures(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
    """One picture of one colour for each name, of a height and a width."""
    random = np.random.default_rng(3)
    lines = []
    for index, (name, size) in enumerate(sizes.items()):
        pixels = np.broadcast_to(random.integers(256, size=3, dtype=np.uint8), (*size, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"plain picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_grey_pictures(folder: Path, garments: Iterable[int]) -> None:
    """The files of Fashion-MNIST for training, of noise: a header of IDX, then bytes."""
    labels = np.array(list(garments), np.uint8)
    pixels = np.random.default_rng(1).integers(256, size=(len(labels), 28, 28), dtype=np.uint8)
    for name, values in (("labels-idx1", labels), ("images-idx3", pixels)):
        header = b"\x00\x00\x08" + bytes([values.ndim]) + np.array(values.shape, ">i4").tobytes()
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
