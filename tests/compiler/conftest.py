from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minimal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: see `save_minimal_pipeline`."""
    from minimal_pipeline import save_minimal_pipeline

    return save_minimal_pipeline(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of an untrained model: v-prediction, 5 latent channels of 10x10, pictures of 40x40."""
    from minimal_pipeline import save_minimal_pipeline

    return save_minimal_pipeline(tmp_path_factory.mktemp("model"), guidance_width=None)
