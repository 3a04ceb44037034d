"""Pixels and PNG files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdc.engines.errors import InputError
from sdc.engines.picture import images_from_pixels, pixels_from_decoded, save_png

PARAMETERS = {
    "prompt": "rød 👟",
    "negative_prompt": "",
    "steps": 3,
    "sampler": "lcm",
    "guidance_scale": 1.5,
    "seed": 8,
    "width": 7,
    "height": 5,
    "model": "m",
}


def test_pixels_equal_diffusers() -> None:
    decoded = np.random.default_rng(0).normal(size=(3, 3, 50, 70)).astype(np.float32)
    # Every half between two grey values, where rounding decides.
    decoded[0, 0].flat[:510] = np.arange(510, dtype=np.float32) / 255 - 1
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded), output_type="pil")
    np.testing.assert_array_equal(pixels_from_decoded(decoded), np.stack([np.asarray(image) for image in theirs]))


def test_a_png_holds_the_pixels_and_the_parameters(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    images = images_from_pixels(pixels, [PARAMETERS, {**PARAMETERS, "negative_prompt": "blå"}])
    for index, image in enumerate(images):
        save_png(image, tmp_path / f"{index}.png")
    with Image.open(tmp_path / "1.png") as read:
        np.testing.assert_array_equal(np.asarray(read), pixels[1])
        assert json.loads(read.text["sdc"]) == {**PARAMETERS, "negative_prompt": "blå"}
        assert read.text["parameters"].splitlines() == [
            "rød 👟",
            "Negative prompt: blå",
            "Steps: 3, Sampler: lcm, CFG scale: 1.5, Seed: 8, Size: 7x5, Model: m",
        ]
    with Image.open(tmp_path / "0.png") as read:
        assert "Negative" not in read.text["parameters"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    image = images_from_pixels(np.zeros((1, 5, 7, 3), np.uint8), [PARAMETERS])[0]
    save_png(image, path)
    before = path.read_bytes()

    def full_disk(self: Image.Image, target: Path, *_: object, **__: object) -> None:
        Path(target).write_bytes(before[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*out.png: No space left on device"):
        save_png(image, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    image = images_from_pixels(np.zeros((1, 5, 7, 3), np.uint8), [PARAMETERS])[0]
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        save_png(image, tmp_path / "nowhere" / "out.png")
