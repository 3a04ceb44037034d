"""The most memory that this process held during a piece of work."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil


class PeakMemory:
    """Context manager; afterwards `peak_bytes` is the largest resident size in the block.

    Linux keeps a high-water mark that can be reset. Elsewhere the mark of the whole process is used where there is one.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present size
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak_bytes = high_water_bytes()


def high_water_bytes() -> int:
    """The largest resident size of this process since it began or the mark was reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
