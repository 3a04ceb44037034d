"""What `sdc plan` predicts beside what is taken: by each engine, by the pictures of a pipeline and by `sdc run`.

    python scripts/memory_predicted.py build/sd15-int8 --target cpu --size 512 768 --batch 1 2 3 4 --json int8.json

Each row is a fresh process; an engine that is given the same for several pictures has one row. With ``--json`` what was
measured is kept, so the table can be made in parts; ``--known`` measures nothing and prints what is kept.

Figures are in MB of 10^6 bytes. Weights and graph are as the backend holds them. Measured is the high-water mark of the
resident memory, less that with the backend's library and no engine to speak of; in rows of `sdc run`, where `sdc plan`
knows what the process takes, it is all of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdc.compiler.memory.prediction_rows import KINDS, Course, Measurements, Row, rows_of
from sdc.compiler.plain_json import check_writable
from sdc.compiler.text_table import markdown_row

HEADS = ("engine", "sizes", "weights", "graph", "activations", "predicted", "measured", "predicted / measured")
AIM = 0.1
"""How far a prediction may be off."""


def main() -> None:
    """Print a row for each engine at each of its sizes and for the pictures, and how many are close."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--size", type=int, nargs="+", default=[512], metavar="PX")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=1, help="of pictures (default: 1)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-prefetch", action="store_true", help="pictures as `sdc run --no-prefetch` draws them")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of rows (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was measured there, and use it")
    parser.add_argument("--known", action="store_true", help="only rows that were measured before")
    options = parser.parse_args()
    check_writable(options.json)
    course = Course(options.target, options.guidance, options.steps, options.threads, not options.no_prefetch)
    measurements = Measurements(options.json, course, options.bundle)
    rows = rows_of(options.bundle, course, options.size, options.batch)
    print(markdown_row(*HEADS), markdown_row(*["---"] * len(HEADS)), sep="\n")
    ratios = {}
    for row in (row for kind in options.kinds for row in rows[kind]):
        if measurements.known(row) or not options.known:
            measured = measurements.of(row)
            ratios[row.key] = row.predicted_bytes / measured
            print_row(row, measured)
    print_summary(ratios)


def print_row(row: Row, measured: int) -> None:
    """One line of the table, in MB."""
    cells = [f"{figure / 1e6:,.1f}" for figure in (*row.parts, row.predicted_bytes, measured)]
    empty = [""] * (5 - len(cells))
    print(markdown_row(row.name, row.sizes, *empty, *cells, f"{row.predicted_bytes / measured:.2f}"), flush=True)


def print_summary(ratios: dict[str, float]) -> None:
    """How many rows are close, and the furthest on either side."""
    if not ratios:
        return
    close = sum(abs(ratio - 1) <= AIM for ratio in ratios.values())
    low, high = min(ratios, key=lambda key: ratios[key]), max(ratios, key=lambda key: ratios[key])
    print(f"\n{close} of {len(ratios)} rows within {AIM:.0%}; {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high})")


if __name__ == "__main__":
    main()
