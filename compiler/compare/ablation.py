"""`sdc compare --ablate`: what every pass is worth, one row for each that changes the lowered graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sdc.compiler.compare.beside import Feeds, run_beside
from sdc.compiler.compare.execution import Execution
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.footprint import Footprint, take_footprint
from sdc.compiler.compare.outputs import Timing, compare_outputs, draw_feeds, seconds_in_turn, timing_from_seconds
from sdc.compiler.compare.variants import Variant, all_phases, build_variants, is_hoisted
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB
from sdc.compiler.plain_json import finite_json
from sdc.compiler.trace.guards import explaining_full_disk
from sdc.compiler.workshop.worker import Worker
from sdc.engines.session import Session
from sdc.engines.sessions import open_session
from sdc.engines.targets import Target, runnable

MEMORY_OF_ENGINE = 3
"""A loaded engine takes up to so many times its files' size; with little memory, engines are loaded for every round."""


@dataclass(frozen=True)
class AblationRow:
    """The graph after some passes, lowered.

    Attributes:
        passes: those since the row before; only the last one changed the lowered graph. None in the first row.
        nodes: of the lowered graph.
        execution: kernels of one call, None if it was not run; likewise all that follows.
        peak_memory_bytes: of a process of its own that loads and runs the engine.
        relative_rms: error of the outputs against the first row's, the largest of all outputs.
        psnr_db: likewise, the smallest, with the range of the first row's values as the peak.
        timing: of a call, against the first row.
        beside_seconds: after hoisting, of a call of each engine that runs outside of the loop, by its name; such a row
            is the engine that runs at each step.
    """

    passes: tuple[str, ...]
    nodes: int
    execution: Execution | None = None
    peak_memory_bytes: int | None = None
    relative_rms: float | None = None
    psnr_db: float | None = None
    timing: Timing | None = None
    beside_seconds: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Ablation:
    """All rows.

    Attributes:
        subject: what was compiled, and for what.
        shapes: sizes of the inputs.
        rows: cumulative.
        idle: passes after the last row's, which change nothing.
        not_run: why the engines were not run; None if they were.
    """

    subject: str
    shapes: dict[str, tuple[int, ...]]
    rows: tuple[AblationRow, ...]
    idle: tuple[str, ...]
    not_run: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = asdict(self)
        for row, plain in zip(self.rows, value["rows"], strict=True):
            plain["kernels"] = None if row.execution is None else row.execution.count
        plain = finite_json(value)
        assert isinstance(plain, dict)
        return plain


def ablate(
    graph: ExportedGraph,
    target: Target,
    *,
    precision: str = "fp32",
    rounds: int = 7,
    threads: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Ablation:
    """Build, run and time the graph after every pass.

    Args:
        graph: before any pass.
        target: what it is lowered for.
        precision: "fp32", "fp16", or "int8" if the graph is calibrated.
        rounds: timed rounds over all rows.
        threads: CPU threads; None leaves it to the backend.
        seed: of the inputs.
        say: told what is being done.

    Raises:
        ExportError: an engine cannot be built, or the disk is full.
        InputError: an unknown precision, or it needs calibration.
    """
    *phases, _lowering = all_phases(graph.spec.name, precision, target, table=graph.table)
    feeds = draw_feeds(graph.spec, seed=seed)
    with (
        tempfile.TemporaryDirectory(prefix="sdc-ablation-") as scratch,
        explaining_full_disk(Path(scratch)),
    ):
        say("building a variant for every pass")
        with Worker(log_path=Path(scratch, "worker.log")) as worker:
            build = partial(build_variants, hoist=is_hoisted(graph))
            variants = worker.call(build, graph, phases, target, Path(scratch, "engines")).value
        rows = [AblationRow(variant.passes, variant.nodes) for variant in variants.rows]
        not_run = runnable(target)
        if not_run is None:
            rows = _measure(variants.rows, feeds, rounds=rounds, threads=threads, say=say)
    return Ablation(
        subject=f"{graph.origin}, {precision}, target {target.name}",
        shapes={name: feed.shape for name, feed in feeds.items()},
        rows=tuple(rows),
        idle=variants.idle,
        not_run=not_run,
    )


def _measure(
    variants: Sequence[Variant], feeds: Feeds, *, rounds: int, threads: int | None, say: Callable[[str], None]
) -> list[AblationRow]:
    """Run and time all variants."""
    calls = []
    footprints = []
    for index, variant in enumerate(variants):
        say(f"running variant {index + 1} of {len(variants)}")
        calls.append(run_beside(variant, feeds, rounds=rounds, threads=threads))
        assert variant.source is not None
        footprints.append(take_footprint(variant.source, calls[-1].feeds, threads=threads))
    say(f"timing {len(variants)} variants in turn, {rounds} rounds")
    seconds = _time(variants, [call.feeds for call in calls], rounds=rounds, threads=threads)
    return [
        replace(
            _row(variant, footprints[0], footprints[index], timing_from_seconds(seconds[:, 0], seconds[:, index])),
            beside_seconds=calls[index].beside_seconds,
        )
        for index, variant in enumerate(variants)
    ]


def _row(variant: Variant, reference: Footprint, found: Footprint, timing: Timing) -> AblationRow:
    outputs = compare_outputs(reference.outputs, found.outputs)
    return AblationRow(
        passes=variant.passes,
        nodes=variant.nodes,
        execution=found.execution,
        peak_memory_bytes=found.peak_memory_bytes,
        relative_rms=float(np.max([output.relative_rms for output in outputs])),  # NaN stays, unlike in max()
        psnr_db=float(np.min([_psnr(wanted, found.outputs[name]) for name, wanted in reference.outputs.items()])),
        timing=timing,
    )


def _psnr(wanted: np.ndarray, found: np.ndarray) -> float:
    """Of arrays of any shape, with the range of `wanted` as the peak."""
    error = float(np.square(wanted.astype(np.float64) - found).mean())
    peak = float(np.ptp(wanted))
    if error == 0:
        return PSNR_CEILING_DB
    return min(PSNR_CEILING_DB, 10 * float(np.log10(peak**2 / error)))


def _time(variants: Sequence[Variant], feeds: Sequence[Feeds], *, rounds: int, threads: int | None) -> np.ndarray:
    """[rounds, variants], seconds of a call with the variant's own feeds.

    In every round each variant is called once. Where not all fit into memory together, each is loaded, warmed up and
    called in turn, so that at any time only one is there.
    """
    needed = MEMORY_OF_ENGINE * sum(variant.engine_bytes for variant in variants)
    if needed < psutil.virtual_memory().available:
        with ExitStack() as stack:
            sessions = [stack.enter_context(_session(variant, threads)) for variant in variants]
            return seconds_in_turn(
                [_call(session, each) for session, each in zip(sessions, feeds, strict=True)], rounds=rounds
            )
    seconds = np.empty((rounds, len(variants)))
    for index in range(rounds):
        for place in range(len(variants)):
            which = (index + place) % len(variants)
            with _session(variants[which], threads) as session:
                seconds[index, which] = seconds_in_turn([_call(session, feeds[which])], rounds=1)[0, 0]
    return seconds


def _session(variant: Variant, threads: int | None) -> Session:
    assert variant.source is not None
    return open_session(variant.source, threads=threads)


def _call(session: Session, feeds: Feeds) -> Callable[[], object]:
    return lambda: session.run(feeds)
