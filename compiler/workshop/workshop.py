"""Runs the stages of an export: from the cache where it can, else in the worker process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdc.compiler.workshop.cache import Entry, StageCache
from sdc.compiler.workshop.progress import StageLog
from sdc.compiler.workshop.worker import Worker


@dataclass(frozen=True)
class Workshop:
    """What stages are run with."""

    cache: StageCache
    worker: Worker
    stages: StageLog

    def produce(
        self, label: str, stage: str, key: str, function: Callable[..., Any], *arguments: Any, reports: bool = False
    ) -> Entry:
        """Result of a stage, from the cache or from the worker: ``function(*arguments, folder[, report])``."""
        with self.stages.stage(label) as outcome:

            def make(folder: Path) -> Any:
                on_report = self.stages.progress.advance if reports else None
                done = self.worker.call(function, *arguments, folder, on_report=on_report)
                outcome.peak_memory_bytes = done.peak_memory_bytes
                return done.value

            entry, outcome.cached = self.cache.produce(stage, key, make)
        return entry
