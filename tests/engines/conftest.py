from __future__ import annotations

import ctypes

import pytest

from sdc.engines.kernels.convolution import Convolver
from sdc.engines.kernels.library import Kernels, find_kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The kernels as this machine uses them."""
    found = find_kernels()
    if isinstance(found, str):
        pytest.skip(f"no CPU kernels: {found}")
    return found


@pytest.fixture(scope="module")
def convolver(kernels: Kernels) -> Convolver:
    """What convolves."""
    if kernels.convolver is None:
        pytest.skip("the processor has no AMX")
    return kernels.convolver


@pytest.fixture(scope="module")
def packer(kernels: Kernels) -> Convolver:
    """What packs weights on any processor, for tests that do not convolve."""
    return Convolver(ctypes.CDLL(str(kernels.path)))


@pytest.fixture(scope="module")
def kernels_without_amx(kernels: Kernels) -> Kernels:
    """The kernels as a machine without AMX uses them."""
    return Kernels(kernels.path, amx=False)


@pytest.fixture(scope="module", params=["AVX512_BF16", "AVX512_VNNI", "AMX_BF16"])
def path(kernels: Kernels, request: pytest.FixtureRequest) -> tuple[Kernels, bool]:
    """Kernels that compute with one instruction set, when `eight_bits` is what comes with them."""
    eight_bits = request.param == "AVX512_VNNI"
    found = Kernels(kernels.path, amx=request.param == "AMX_BF16")
    if found.instructions(eight_bits=eight_bits) != request.param:
        pytest.skip(f"the processor has no {request.param}")
    return found, eight_bits
