"""What a graph pass is, and what it reports."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A site that looked like a match and was left alone.

    Attributes:
        site: the node's name (operator and first output when it has none).
        reason: the precondition that failed, with what was found.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph.

    Attributes:
        name: the pass's name on the command line.
        matched: number of rewritten sites.
        skipped: sites left alone, with reasons.
        nodes_before: nodes of the graph before the pass, subgraphs and functions not counted; ``nodes_after`` likewise.
        seconds: wall time.
        details: figures that only this pass has, as JSON values.
    """

    name: str
    matched: int
    skipped: tuple[Skipped, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """A graph rewrite. Subclasses are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    @abstractmethod
    def rewrite(self, model: ir.Model) -> PassReport:
        """Change `model` in place and say what was matched and skipped; counts and seconds are filled in by `run`."""

    def run(self, model: ir.Model) -> PassReport:
        """Apply the pass and complete its report."""
        nodes_before = len(model.graph)
        begin = time.perf_counter()
        report = self.rewrite(model)
        seconds = time.perf_counter() - begin
        log.info("%s: %d matched, %d skipped, %.2f s", self.name, report.matched, len(report.skipped), seconds)
        return PassReport(
            name=self.name,
            matched=report.matched,
            skipped=report.skipped,
            nodes_before=nodes_before,
            nodes_after=len(model.graph),
            seconds=seconds,
            details=report.details,
        )


def run_passes(passes: Iterable[Pass], model: ir.Model) -> list[PassReport]:
    """Apply passes in order to `model`, in place."""
    return [each.run(model) for each in passes]
