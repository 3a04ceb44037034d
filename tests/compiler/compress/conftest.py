from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from minimal_pipeline import save_minimal_pipeline
from PIL import Image


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of an untrained model: v-prediction, 5 latent channels of 10x10, pictures of 40x40."""
    return save_minimal_pipeline(tmp_path_factory.mktemp("model"), guidance_width=None)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty plain pictures with captions: two of them are held out."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    lines = []
    for index in range(40):
        pixels = np.broadcast_to(random.integers(256, size=3, dtype=np.uint8), (40, 40, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"plain picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
