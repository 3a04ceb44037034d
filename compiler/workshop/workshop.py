"""Runs the stages of an export: from the cache where it can, else in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.workshop.cache import Entry, StageCache
from sdc.compiler.workshop.memory_watch import MemoryWatch
from sdc.compiler.workshop.progress import StageLog, StageOutcome
from sdc.compiler.workshop.worker import Worker
from sdc.engines.errors import ExportError


@dataclass(frozen=True)
class Workshop:
    """What stages are run with.

    Attributes:
        cache: keeps their results.
        worker: runs them.
        stages: is told of them.
        memory: watches what they hold; None where nothing does.
    """

    cache: StageCache
    worker: Worker
    stages: StageLog
    memory: MemoryWatch | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[StageOutcome]:
        """A block that is one stage.

        Raises:
            ExportError: more memory was held than is allowed.
        """
        with self.stages.stage(name) as outcome:
            if self.memory is None:
                yield outcome
                return
            self.memory.begin()
            try:
                yield outcome
            except ExportError:
                self.memory.check(name)  # the worker's death has a better reason
                raise
            outcome.held_bytes = self.memory.largest.held_bytes
            self.memory.check(name)

    def produce(
        self, label: str, stage: str, key: str, function: Callable[..., Any], *arguments: Any, reports: bool = False
    ) -> Entry:
        """Result of a stage, from the cache or from the worker: ``function(*arguments, folder[, report])``."""
        with self.stage(label) as outcome:

            def make(folder: Path) -> Any:
                on_report = self.stages.progress.advance if reports else None
                done = self.worker.call(function, *arguments, folder, on_report=on_report)
                outcome.peak_memory_bytes = done.peak_memory_bytes
                return done.value

            entry, outcome.cached = self.cache.produce(stage, key, make)
        return entry
