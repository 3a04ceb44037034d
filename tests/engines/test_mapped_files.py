"""Pages of mapped files that were read once."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import pytest
from mapped_pages import resident_bytes

from sdc.engines.sessions.mapped_files import read_once

SIZE = 1 << 22

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "weights with a space.bin"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    return file


def opened(path: Path, access: int) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def read(pages: mmap.mmap) -> int:
    return sum(pages[place] for place in range(0, SIZE, 4096))


def test_pages_are_let_go_of_and_can_be_read_again(path):
    with opened(path, mmap.ACCESS_READ) as pages:
        expected = read(pages)
        assert resident_bytes(path) == SIZE
        with read_once([path]):
            assert read(pages) == expected
        assert resident_bytes(path) == 0
        assert read(pages) == expected


def test_while_the_block_runs(path):
    with opened(path, mmap.ACCESS_READ) as pages, read_once([path]):
        read(pages)
        deadline = time.monotonic() + 60
        while resident_bytes(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident_bytes(path) == 0


def test_what_was_written_stays(path):
    with opened(path, mmap.ACCESS_COPY) as pages:
        pages[4096] = 77
        with read_once([path]):
            pass
        assert pages[4096] == 77
        assert resident_bytes(path) > 0


def test_other_files_stay(path, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(path.read_bytes())
    with opened(other, mmap.ACCESS_READ) as pages:
        read(pages)
        with read_once([path]):
            pass
        assert resident_bytes(other) == SIZE


def test_an_error_in_the_block_comes_out(path):
    with pytest.raises(ZeroDivisionError), read_once([path]):
        raise ZeroDivisionError
