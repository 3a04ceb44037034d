"""What engines and pipelines really take: the high-water mark of a fresh process, the libraries' own part aside."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdc.compiler.memory.picture_plan import Request
from sdc.compiler.workshop.worker import Worker
from sdc.engines import load
from sdc.engines.bundle import open_bundle
from sdc.engines.specs import ComponentSpec
from sdc.engines.targets import BACKEND_MODULES

_RUNS = 2
"""The second run of a size may lay its memory out anew."""


@dataclass(frozen=True)
class Measured:
    """A process's resident memory.

    Attributes:
        libraries_bytes: with the interpreter and the backend's library in it, and no engine.
        peak_bytes: the most while the work was done.
    """

    libraries_bytes: int
    peak_bytes: int

    @property
    def work_bytes(self) -> int:
        """What the work took."""
        return self.peak_bytes - self.libraries_bytes


def measure_engine(
    bundle: Path, target: str, component: str, sizes: dict[str, int], *, threads: int | None = None
) -> Measured:
    """Load one engine in a fresh process and run it twice with random inputs of given sizes.

    Scripts that call this need the usual ``if __name__ == "__main__":``; likewise `measure_pictures`.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: the process died.
        TargetError: this machine cannot run the target.
    """
    return _measure(bundle, target, _run_engine, str(bundle), target, component, sizes, threads)


def measure_pictures(
    bundle: Path, target: str, request: Request, *, steps: int = 2, threads: int | None = None
) -> Measured:
    """Draw pictures in a fresh process.

    Raises:
        SdcError: as `measure_engine`; InputError: the request is outside of what the bundle takes.
    """
    return _measure(bundle, target, _draw, str(bundle), target, request, steps, threads)


def _measure(bundle: Path, target: str, work: Callable[..., None], *arguments: Any) -> Measured:
    module = BACKEND_MODULES[open_bundle(bundle, verify=False).manifest.targets[target].backend]
    with (
        tempfile.TemporaryDirectory(prefix="sdc-measure-") as folder,
        Worker(log_path=Path(folder, "worker.log")) as worker,
    ):
        libraries = worker.call(_import_libraries, module)
        done = worker.call(work, *arguments)
    return Measured(libraries.peak_memory_bytes, done.peak_memory_bytes)


def _import_libraries(module: str) -> None:
    importlib.import_module(module)
    importlib.import_module("sdc.engines.pipeline")


def _run_engine(bundle: str, target: str, component: str, sizes: dict[str, int], threads: int | None) -> None:
    opened = open_bundle(bundle, verify=False)
    feeds = random_feeds(opened.manifest.components[component], sizes)
    with opened.load_session(component, opened.choose_target(target), threads=threads) as session:
        for _ in range(_RUNS):
            session.run(feeds)


def random_feeds(spec: ComponentSpec, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of given sizes: normal, token ids all 1."""
    generator = np.random.default_rng(0)
    feeds = {}
    for tensor in spec.inputs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        integers = tensor.dtype == "int64"
        feeds[tensor.name] = np.ones(shape, np.int64) if integers else generator.standard_normal(shape, np.float32)
    return feeds


def _draw(bundle: str, target: str, request: Request, steps: int, threads: int | None) -> None:
    with load(bundle, target, verify=False, threads=threads) as pipe:
        pipe(
            "a photo",
            steps=steps,
            seed=0,
            batch=request.pictures,
            height=request.height_px,
            width=request.width_px,
            guidance_scale=request.guidance_scale,
            deepcache=steps if request.deepcache else 1,
        )
