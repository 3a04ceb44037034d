"""Predictions beside measurements: a row for each engine at each of its sizes, and for pictures drawn in three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdc.compiler.memory.engine_plan import EnginePlan, EnginePlanner, Request
from sdc.compiler.memory.measure import measure_engine, measure_pictures, measure_run
from sdc.compiler.memory.picture_plan import PicturePlan, check_request, plan_with
from sdc.compiler.plain_json import write_json
from sdc.engines.bundle import open_bundle
from sdc.engines.checked_json import read_json
from sdc.engines.errors import InputError

ENGINES, STAY, RELEASED, RUN = "engines", "stay", "released", "run"
KINDS = (ENGINES, STAY, RELEASED, RUN)
"""Rows: every engine by itself; pictures with engines that stay loaded, or are released; the process of `sdc run`."""


@dataclass(frozen=True)
class Row:
    """Something that takes memory.

    Attributes:
        name: of it.
        sizes: of what it is given, in words.
        parts: bytes of weights, graph and activations; nothing for the peak of several engines.
        predicted_bytes: what `sdc plan` says of it.
        measure: runs it in a fresh process and returns the bytes that it took.
    """

    name: str
    sizes: str
    parts: tuple[int, ...]
    predicted_bytes: int
    measure: Callable[[], int]

    @property
    def key(self) -> str:
        """Unlike that of any other row of a target."""
        return f"{self.name}, {self.sizes}"


@dataclass(frozen=True)
class Course:
    """How rows are measured: equal for all that are compared.

    Attributes:
        target: of the bundle.
        guidance_scale: of the pictures.
        steps: of the pictures.
        threads: of the processor; None leaves it to the backend.
        prefetch: whether pictures have engines loaded while others run.
    """

    target: str
    guidance_scale: float
    steps: int
    threads: int | None
    prefetch: bool


def rows_of(folder: Path, course: Course, sizes_px: Iterable[int], batches: Iterable[int]) -> dict[str, list[Row]]:
    """The rows of square pictures of all sizes in all numbers, by kind; an engine that is given the same has one.

    Raises:
        SdcError: as `plan_pictures`.
    """
    bundle = open_bundle(folder, verify=False)
    planner = EnginePlanner(bundle, bundle.target(course.target).name)
    rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    batches = tuple(batches)
    for size_px in sizes_px:
        for batch in batches:
            request = Request(size_px, size_px, batch, course.guidance_scale, prefetch=course.prefetch)
            check_request(bundle, request)
            plan = plan_with(planner, course.target, request)
            known = {row.key for row in rows[ENGINES]}
            rows[ENGINES] += [row for row in _engine_rows(folder, plan, course) if row.key not in known]
            for kind, row in _picture_rows(folder, plan, course):
                rows[kind].append(row)
    return rows


def _engine_rows(folder: Path, plan: PicturePlan, course: Course) -> Iterator[Row]:
    for name, engine in plan.engines.items():
        sizes = " ".join(f"{symbol}={size}" for symbol, size in engine.sizes.items())

        def measure(name: str = name, engine: EnginePlan = engine) -> int:
            return measure_engine(folder, plan.target, name, dict(engine.sizes), threads=course.threads).work_bytes

        parts = (engine.held.weight_bytes, engine.held.graph_bytes, engine.activation_bytes + engine.workspace_bytes)
        yield Row(name, sizes, parts, engine.total_bytes, measure)


def _picture_rows(folder: Path, plan: PicturePlan, course: Course) -> Iterator[tuple[str, Row]]:
    request, peak = plan.request, plan.peak
    sizes = f"{request.pictures} of {request.width_px}x{request.height_px}"

    def draw(keep_loaded: bool) -> int:
        return measure_pictures(
            folder, plan.target, request, steps=course.steps, threads=course.threads, keep_loaded=keep_loaded
        ).work_bytes

    parts = (peak.weight_bytes, peak.graph_bytes, peak.activation_bytes)
    yield STAY, Row("pictures, engines stay", sizes, parts, peak.total_bytes, partial(draw, True))
    yield RELEASED, Row("pictures, engines released", sizes, (), plan.released_bytes, partial(draw, False))
    if plan.process_bytes is not None:
        run = partial(measure_run, folder, plan.target, request, steps=course.steps, threads=course.threads)
        yield RUN, Row("`sdc run`, all", sizes, (), plan.run_bytes, run)


class Measurements:
    """Bytes that rows took, in a file that is written after each: what is known is not measured again.

    Args:
        path: of the file; None keeps nothing. Several processes may add to it.
        course: how rows are measured.
        bundle: whose rows they are.

    Raises:
        BundleError: the file is damaged.
        InputError: it is of other measurements.
    """

    def __init__(self, path: Path | None, course: Course, bundle: Path) -> None:
        self._path = path
        self._about: dict[str, Any] = {"bundle": bundle.name, **vars(course)}
        self._bytes: dict[str, int] = {}
        self._read()

    def known(self, row: Row) -> bool:
        """Whether a row was measured."""
        return row.key in self._bytes

    def of(self, row: Row) -> int:
        """What a row took; it is measured if that is not known."""
        if not self.known(row):
            taken = row.measure()
            self._read()
            self._bytes[row.key] = taken
            write_json(self._path, {"about": self._about, "bytes": self._bytes})
        return self._bytes[row.key]

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        value = read_json(self._path)
        found = value.member("about").value
        if found != self._about:
            raise InputError(
                f"{self._path} holds measurements of {found}, expected {self._about}",
                hint="name another file, or remove it",
            )
        self._bytes |= {key: each.integer(0) for key, each in value.member("bytes").members()}
