from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from small_pipelines import make_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return make_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def folder(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as diffusers saves it."""
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path
