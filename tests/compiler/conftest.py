from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minimal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: see `save_minimal_pipeline`."""
    from minimal_pipeline import save_minimal_pipeline

    return save_minimal_pipeline(tmp_path_factory.mktemp("pipelines"))
