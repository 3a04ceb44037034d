"""What all processes of an export hold, sampled; and its limit.

What is held is what cannot be given back without swapping: anonymous and shared memory. Pages of files that are mapped
are not counted, as the kernel takes them back when it needs memory; nor does a control group's limit kill for them.

Source: Linux, proc(5): ``RssAnon``, ``RssShmem`` and ``RssFile`` of /proc/PID/status.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from sdc.compiler.byte_sizes import gibibytes
from sdc.engines.errors import ExportError

INTERVAL_SECONDS = 0.01


@dataclass(frozen=True)
class Resident:
    """Memory of one or several processes, in bytes."""

    held_bytes: int = 0
    file_bytes: int = 0

    def __add__(self, other: Resident) -> Resident:
        return Resident(self.held_bytes + other.held_bytes, self.file_bytes + other.file_bytes)


class MemoryWatch:
    """Samples this process and all below it, in a thread, while it is used as a context manager.

    Args:
        limit_bytes: of what they hold together; None for no limit.
        on_excess: called once, in any thread, when they hold more: it has to end the work.
    """

    def __init__(self, limit_bytes: int | None = None, on_excess: Callable[[], None] = lambda: None) -> None:
        self.limit_bytes = limit_bytes
        self._on_excess = on_excess
        self._largest = Resident()
        self._excess_bytes: int | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sdc-memory-watch", daemon=True)

    def begin(self) -> None:
        """What was seen before does not count any more; what is held now does."""
        found = resident_tree()
        with self._lock:
            self._largest = found

    @property
    def largest(self) -> Resident:
        """At the time since `begin` at which most was held, this moment included."""
        self._look()
        with self._lock:
            return self._largest

    def check(self, stage: str) -> None:
        """Check that the limit was kept.

        Raises:
            ExportError: it was not, in the stage of this name.
        """
        with self._lock:
            excess = self._excess_bytes
        if excess is None or self.limit_bytes is None:
            return
        raise ExportError(
            f"the stage {stage!r} needs more memory than {gibibytes(self.limit_bytes)}: it held {gibibytes(excess)} "
            "when it was ended. The bundle was not changed, and the stages before need not run again",
            hint=_remedy(stage),
        )

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        found = resident_tree()
        with self._lock:
            self._largest = max(self._largest, found, key=lambda each: each.held_bytes)
            is_over = self.limit_bytes is not None and found.held_bytes > self.limit_bytes
            begins = is_over and self._excess_bytes is None
            if begins:
                self._excess_bytes = found.held_bytes
        if begins:
            self._on_excess()


def resident_tree() -> Resident:
    """Of this process and all below it."""
    this = psutil.Process()
    total = Resident()
    for process in (this, *this.children(recursive=True)):
        with suppress(OSError):  # it has ended
            total += resident_from_status(Path(f"/proc/{process.pid}/status").read_text())
    return total


def resident_from_status(status: str) -> Resident:
    """Of the text of /proc/PID/status; nothing of a process that has ended and waits for its parent."""
    lines = (line.split() for line in status.splitlines() if line.startswith("Rss"))
    kibibytes = {name.removesuffix(":"): int(size) for name, size, _ in lines}
    held = kibibytes.get("RssAnon", 0) + kibibytes.get("RssShmem", 0)
    return Resident(1024 * held, 1024 * kibibytes.get("RssFile", 0))


_REMEDIES = {
    "export": "it holds the weights of one network in float32 and torch: give it more",
    "calibrate": "give it more, a smaller --calibration-size, or the calibration/unet.json of another export "
    "(--calibration-table)",
    "check fp16": "give it more, or choose --precision bf16 or fp32, which need no check",
    "plan": "give it more, or a --precision other than auto",
    "build": "give it more, or leave out this target",
}
"""By the beginning of a stage's name: what makes it take less."""


def _remedy(stage: str) -> str:
    return next((text for name, text in _REMEDIES.items() if stage.startswith(name)), "give it more")
