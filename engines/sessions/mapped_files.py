"""Pages of a mapped file, let go of once they have been read.

A backend that maps a file of weights, and copies them into a layout of its own, keeps both in memory: the pages of the
file count as resident until the system wants them back, which tools that watch a process's memory do not know.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_SECONDS = (0.001, 0.05)
"""Between two rounds, at least and at most: a backend reads up to 100 MB in the longer."""
_BYTES_PER_SECOND = 10e9
"""By which a file's size gives that time, so that of a small file too the smaller part is in memory."""
_SHARED_READ_ONLY = "r--s"
"""Nothing but the file's own content can be in such a mapping; from a private one, what was written would be lost."""


@contextmanager
def read_once(address: int | None) -> Iterator[None]:
    """While the block runs, and at its end, let go of the pages of the file that is mapped at an address.

    They stay in the system's cache, from which they are mapped again if they are read again. Nothing happens where the
    address is of no file that is mapped for reading alone, or the system is not Linux.

    Args:
        address: of any byte of the mapping, which the caller keeps until the block ends.
    """
    mapping = None if address is None else _mapping_at(address)
    if mapping is None:
        yield
        return
    done = threading.Event()
    seconds = seconds_between_rounds(mapping[1] - mapping[0])

    def work() -> None:
        while not done.wait(seconds):
            _let_go(*mapping)

    helper = threading.Thread(target=work, name="sdc-read-once", daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
        _let_go(*mapping)


def seconds_between_rounds(count: int) -> float:
    """Of letting go of a file of so many bytes."""
    least, most = _SECONDS
    return min(max(count / _BYTES_PER_SECOND, least), most)


def _let_go(begin: int, end: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _mapping_at(address: int) -> tuple[int, int] | None:
    """Where the file's mapping around an address begins and ends; from /proc/self/maps, see proc(5)."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or not allowed: nothing is lost but memory
        return None
    for line in lines:
        addresses, access, *_ = line.split()
        begin, end = (int(each, 16) for each in addresses.split("-"))
        if begin <= address < end:
            return (begin, end) if access == _SHARED_READ_ONLY else None
    return None
