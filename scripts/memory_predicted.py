"""What `sdc plan` predicts beside what is taken: by each engine, by the pictures of a pipeline and by `sdc run`.

    python scripts/memory_predicted.py build/tiny-int8 --target cpu --size 64 --batch 1

Each row is a fresh process. Figures are in MB of 10^6 bytes. Weights and graph are as the backend holds them. Measured
is the high-water mark of the resident memory, less that with the backend's library and no engine to speak of; in the
last row, where `sdc plan` knows what the process takes, it is all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from sdc.compiler.memory.engine_plan import EnginePlan, Request
from sdc.compiler.memory.measure import measure_engine, measure_pictures, measure_run
from sdc.compiler.memory.picture_plan import plan_pictures
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle

HEADS = ("engine", "size, batch", "weights", "graph", "activations", "predicted", "measured", "predicted / measured")


def main() -> None:
    """Print a row for each engine, size and batch, and for the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--size", type=int, nargs="+", default=[512], metavar="PX")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    print(markdown_row(*HEADS), markdown_row(*["---"] * len(HEADS)), sep="\n")
    for size in options.size:
        for batch in options.batch:
            print_rows(options.bundle, options.target, Request(size, size, batch, options.guidance), options.threads)


def print_rows(folder: Path, target: str, request: Request, threads: int | None) -> None:
    """The rows of one request."""
    plan = plan_pictures(open_bundle(folder), target, request)
    what = f"{request.width_px}x{request.height_px}, {request.pictures}"
    for name, engine in plan.engines.items():
        measured = measure_engine(folder, target, name, dict(engine.sizes), threads=threads)
        print_row(name, what, engine_parts(engine), engine.total_bytes, measured.work_bytes)
    kept = measure_pictures(folder, target, request, threads=threads)
    peak = plan.peak
    parts = (peak.weight_bytes, peak.graph_bytes, peak.activation_bytes)
    print_row("pictures, engines stay", what, parts, peak.total_bytes, kept.work_bytes)
    released = measure_pictures(folder, target, request, threads=threads, keep_loaded=False)
    print_row("pictures, engines released", what, (), plan.released_bytes, released.work_bytes)
    if plan.process_bytes is not None:
        print_row("`sdc run`, all", what, (), plan.run_bytes, measure_run(folder, target, request, threads=threads))


def engine_parts(engine: EnginePlan) -> tuple[int, int, int]:
    """Bytes of weights, graph and activations."""
    return engine.held.weight_bytes, engine.held.graph_bytes, engine.activation_bytes + engine.workspace_bytes


def print_row(name: str, what: str, parts: Iterable[int], predicted: int, measured: int) -> None:
    """One line of the table, in MB."""
    cells = [f"{figure / 1e6:,.1f}" for figure in (*parts, predicted, measured)]
    empty = [""] * (5 - len(cells))
    print(markdown_row(name, what, *empty, *cells, f"{predicted / measured:.2f}"), flush=True)


if __name__ == "__main__":
    main()
