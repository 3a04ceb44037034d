"""What one engine takes by itself: measured in a process of its own, so that no other engine hides it or adds to it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdc.compiler.compare.execution import Execution, execute_watched
from sdc.compiler.workshop.worker import Worker
from sdc.engines.sessions import EngineSource, open_session


@dataclass(frozen=True)
class Footprint:
    """One engine in a fresh process.

    Attributes:
        peak_memory_bytes: largest resident size while the engine was loaded and run once; the interpreter and the
            backend's library are in it. On Linux the kernel's high-water mark, see `PeakMemory`.
        execution: kernels and bytes of a second call.
        outputs: of the first call, by name.
    """

    peak_memory_bytes: int
    execution: Execution
    outputs: Mapping[str, np.ndarray]


def take_footprint(source: EngineSource, feeds: Mapping[str, np.ndarray], *, threads: int | None) -> Footprint:
    """Load and run an engine in a fresh process.

    Scripts that call this need the usual ``if __name__ == "__main__":``.

    Raises:
        BundleError: the backend cannot read the engine.
        ExportError: the process died.
        TargetError: this machine cannot run the engine.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sdc-footprint-") as folder,
        Worker(log_path=Path(folder, "worker.log")) as worker,
    ):
        ran = worker.call(_run_once, source, feeds, threads)
        watched = worker.call(execute_watched, source, feeds, threads)
    return Footprint(ran.peak_memory_bytes, watched.value, ran.value)


def _run_once(source: EngineSource, feeds: Mapping[str, np.ndarray], threads: int | None) -> dict[str, np.ndarray]:
    with open_session(source, threads=threads) as session:
        return session.run(feeds)
