"""What an export tells while it runs, and afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StageRecord:
    """A stage that ended.

    Attributes:
        name: e.g. "export unet" or "build unet for rtx".
        seconds: wall time.
        peak_memory_bytes: most memory of the process that did the work; 0 where nothing was computed.
        cached: the result was there already.
        held_bytes: the most that all processes held together, see `MemoryWatch`; None where that was not watched.
    """

    name: str
    seconds: float
    peak_memory_bytes: int
    cached: bool
    held_bytes: int | None = None


class Progress(Protocol):
    """Receives what happens; the command line shows it."""

    def begin(self, name: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int) -> None:
        """A part of the present stage is done."""

    def end(self, record: StageRecord) -> None:
        """The stage is over and was successful."""


class Silent:
    """Shows nothing."""

    def begin(self, name: str) -> None:
        """Nothing."""

    def advance(self, done: int, total: int) -> None:
        """Nothing."""

    def end(self, record: StageRecord) -> None:
        """Nothing."""


@dataclass
class StageOutcome:
    """Filled in by the block that a stage is: see `StageLog.stage`."""

    peak_memory_bytes: int = 0
    cached: bool = False
    held_bytes: int | None = None


@dataclass
class StageLog:
    """Times the stages of one export.

    Attributes:
        progress: is told of every stage.
        records: those that ended, in order.
    """

    progress: Progress
    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageOutcome]:
        """A block that is one stage."""
        self.progress.begin(name)
        begin = time.perf_counter()
        outcome = StageOutcome()
        yield outcome
        seconds = time.perf_counter() - begin
        record = StageRecord(name, seconds, outcome.peak_memory_bytes, outcome.cached, outcome.held_bytes)
        self.records.append(record)
        self.progress.end(record)
