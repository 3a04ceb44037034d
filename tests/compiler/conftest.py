from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes in one thread: two test processes with two threads each wait for each other most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
