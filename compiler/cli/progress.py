"""Shows the stages of an export on standard error: live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status

from sdc.compiler.workshop.progress import Progress, StageRecord


@contextmanager
def show_progress() -> Iterator[Progress]:
    """What shows progress as standard error can take it."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        yield _Live(console, status)


def record_text(record: StageRecord) -> str:
    """One line: name, time, memory."""
    if record.cached:
        return f"{record.name:<28} {record.seconds:>7.1f} s   unchanged"
    memory = f"{record.peak_memory_bytes / 1e9:>6.2f} GB" if record.peak_memory_bytes else ""
    return f"{record.name:<28} {record.seconds:>7.1f} s {memory}".rstrip()


class _Lines:
    """A line for every stage that ended."""

    def begin(self, name: str) -> None:
        """Nothing yet."""

    def advance(self, done: int, total: int) -> None:
        """Nothing: lines cannot be taken back."""

    def end(self, record: StageRecord) -> None:
        """Say what it took."""
        print(record_text(record), file=sys.stderr, flush=True)


class _Live:
    """The running stage with a spinner; what ended stays above it."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status
        self._name = ""

    def begin(self, name: str) -> None:
        """Show the name."""
        self._name = name
        self._status.update(name)

    def advance(self, done: int, total: int) -> None:
        """Show how much is done."""
        self._status.update(f"{self._name} {done}/{total}")

    def end(self, record: StageRecord) -> None:
        """Leave a line."""
        self._console.print(record_text(record))
