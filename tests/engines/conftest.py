from __future__ import annotations

import pytest

from sdc.engines.kernels.library import Kernels, find_kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = find_kernels()
    if isinstance(found, str):
        pytest.skip(f"no CPU kernels: {found}")
    return found
