"""What `sdc plan` predicts beside what engines take: each by itself, and a whole picture, in fresh processes.

    python scripts/memory_predicted.py build/tiny-int8 --target ort-cpu --size 64 --batch 1

Figures are in MB of 10^6 bytes. Predicted are weights, shared activations in the graph's order (outputs are among them)
and inputs; measured is the high-water mark of the resident memory, less that with the backend's library and no engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdc.compiler.memory.measure import Measured, measure_engine, measure_pictures
from sdc.compiler.memory.picture_plan import EnginePlan, Request, plan_pictures
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle

HEADS = (
    "engine",
    "size, batch",
    "weights",
    "activations",
    "predicted",
    "measured",
    "predicted / measured",
    "libraries",
)


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
    bundle = open_bundle(options.bundle)
    print(markdown_row(*HEADS), markdown_row(*["---"] * len(HEADS)), sep="\n")
    for size in options.size:
        for batch in options.batch:
            request = Request(size, size, batch, options.guidance)
            plan = plan_pictures(bundle, options.target, request)
            what = f"{size}x{size}, {batch}"
            for name, engine in plan.engines.items():
                sizes = dict(engine.sizes)
                measured = measure_engine(options.bundle, options.target, name, sizes, threads=options.threads)
                print_row(name, what, engine_parts(engine), measured)
            measured = measure_pictures(options.bundle, options.target, request, threads=options.threads)
            peak = plan.peak
            print_row("whole picture", what, (peak.weight_bytes, peak.activation_bytes, peak.input_bytes), measured)


def engine_parts(engine: EnginePlan) -> tuple[int, int, int]:
    """Bytes of weights, activations and inputs."""
    return engine.weight_bytes, engine.memory.written.arena.bytes, engine.memory.input_bytes


def print_row(name: str, what: str, predicted: tuple[int, int, int], measured: Measured) -> None:
    """One line of the table, in MB."""
    weights, activations, _ = predicted
    figures = (weights, activations, sum(predicted), measured.work_bytes)
    ratio = f"{sum(predicted) / measured.work_bytes:.2f}"
    cells = [f"{figure / 1e6:,.1f}" for figure in figures]
    print(markdown_row(name, what, *cells, ratio, f"{measured.libraries_bytes / 1e6:,.1f}"), flush=True)


if __name__ == "__main__":
    main()
