"""Pages of mapped files that were read once."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mapped_pages import resident_bytes

from sdc.engines.sessions.mapped_files import read_once, seconds_between_rounds

SIZE = 1 << 22

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "weights with a space.bin"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    return file


def opened(path: Path, *, private: bool = False) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_READ)


def address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


def read(pages: mmap.mmap) -> int:
    return sum(pages[place] for place in range(0, SIZE, 4096))


def test_pages_are_let_go_of_and_can_be_read_again(path):
    pages = opened(path)
    expected = read(pages)
    assert resident_bytes(path) == SIZE
    with read_once(address(pages) + SIZE // 2):
        assert read(pages) == expected
    assert resident_bytes(path) == 0
    assert read(pages) == expected


def test_while_the_block_runs(path):
    pages = opened(path)
    with read_once(address(pages)):
        read(pages)
        deadline = time.monotonic() + 60
        while resident_bytes(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident_bytes(path) == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_written_stays(path, read_only):
    pages = opened(path, private=True)
    pages[4096] = 77
    if read_only:
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(address(pages)), ctypes.c_size_t(SIZE), mmap.PROT_READ) == 0
    with read_once(address(pages)):
        pass
    assert pages[4096] == 77


def test_another_mapping_of_the_file_stays(path):
    pages, other = opened(path), opened(path)
    read(pages), read(other)
    with read_once(address(pages)):
        pass
    assert resident_bytes(path) == SIZE


@pytest.mark.parametrize("place", [None, 0])
def test_nothing_is_mapped_there(path, place):
    pages = opened(path)
    read(pages)
    with read_once(place):
        pass
    assert resident_bytes(path) == SIZE


def test_an_error_in_the_block_comes_out(path):
    with pytest.raises(ZeroDivisionError), read_once(address(opened(path))):
        raise ZeroDivisionError


@pytest.mark.parametrize(("count", "seconds"), [(1, 0.001), (10**8, 0.01), (10**9, 0.05)])
def test_rounds_come_sooner_for_small_files(count: int, seconds: float) -> None:
    assert seconds_between_rounds(count) == pytest.approx(seconds)
