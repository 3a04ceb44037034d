from __future__ import annotations

from pathlib import Path

import pytest
from picture_folders import write_plain_pictures


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty plain pictures with captions: two of them are held out."""
    sizes = {f"{index}.png": (40, 40) for index in range(40)}
    return write_plain_pictures(tmp_path_factory.mktemp("pictures"), sizes)
