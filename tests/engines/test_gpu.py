import pytest

from sdc.engines import gpu
from sdc.engines.gpu import Gpu, find_gpus


def test_gives_gpus_or_a_reason():
    found = find_gpus()
    assert found, "neither a GPU nor a reason"
    assert isinstance(found, str) or all(isinstance(each, Gpu) for each in found)


def test_a_machine_without_a_driver_is_told_so(monkeypatch):
    monkeypatch.setattr(gpu, "_DRIVER_LIBRARY", "libcuda-that-is-not-there.so.1")
    find_gpus.cache_clear()
    try:
        assert find_gpus() == "there is no NVIDIA driver on this machine"
    finally:
        find_gpus.cache_clear()


@pytest.mark.gpu
def test_describes_the_gpu():
    found = find_gpus()
    assert not isinstance(found, str)
    for each in found:
        assert each.name
        assert each.compute_capability.startswith("sm")
        assert each.memory_bytes > 2**30
        assert float(each.driver_cuda) >= 12
