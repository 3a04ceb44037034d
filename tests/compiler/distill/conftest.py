from __future__ import annotations

from pathlib import Path

import pytest
from picture_folders import write_plain_pictures


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven plain pictures of odd sizes with captions."""
    sizes = {f"picture {index}.png": (41 + index, 67 - index) for index in range(7)}
    return write_plain_pictures(tmp_path_factory.mktemp("pictures"), sizes)
