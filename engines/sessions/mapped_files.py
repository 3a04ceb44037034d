"""Pages of mapped files, let go of once they have been read.

A backend that maps a file of weights, and copies them into a layout of its own, keeps both in memory: the pages of the
file count as resident until the system wants them back, which tools that watch a process's memory do not know.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_SECONDS = 0.05
"""Between two rounds: a backend reads some 100 MB in that time."""
_ADVICE = getattr(mmap, "MADV_DONTNEED", None)


@contextmanager
def read_once(files: Iterable[Path]) -> Iterator[None]:
    """While the block runs, and at its end, let go of the pages of files that this process has mapped for reading.

    They stay in the system's cache, from which they are mapped again if they are read again. Only on Linux; elsewhere
    the block just runs.
    """
    paths = frozenset(os.path.realpath(file) for file in files)
    if _ADVICE is None or not _MAPS.exists():
        yield
        return
    done = threading.Event()

    def work() -> None:
        while not done.wait(_SECONDS):
            _let_go(paths)

    helper = threading.Thread(target=work, name="sdc-read-once", daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
        _let_go(paths)


def _let_go(paths: frozenset[str]) -> None:
    libc = ctypes.CDLL(None)
    for begin, end in _mapped_for_reading(paths):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _ADVICE)


def _mapped_for_reading(paths: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Addresses of mappings of the files that cannot have been written to; from /proc/self/maps, see proc(5)."""
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, access, *_, path = line.split(maxsplit=5)
        if path in paths and access.startswith("r--"):
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)
