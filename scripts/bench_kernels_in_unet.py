"""A step of a bundle's UNet on the target cpu, with the CPU kernels and without, in turn.

    sdc export --model sd15 --weights random --precision int8 --target cpu --out build/sd15-int8
    sdc export --model sd15 --weights random --precision fp32 --target cpu --out build/sd15-fp32
    python scripts/bench_kernels_in_unet.py build/sd15-int8 --reference build/sd15-fp32 --threads 1

Only one side is in memory at a time: each round opens all, one after the other. Medians over all steps, in seconds, of
the time on the clock and of the processor's time, which other programs do not disturb as much; the ratio to the first
side on the clock; and the relative error of one result, drawn from a fixed seed, to the reference's.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np

from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.kernels.library import find_kernels

SIDES = {
    "OpenVINO": "0",
    "attention": "attention",
    "kernels in bf16": "bf16",
    "kernels without AMX": "avx512",
    "kernels": "1",
}
"""Values of SDC_KERNELS; without AMX OpenVINO's own operators still have it."""


def main() -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, help="bundle to compare the results with, in fp32; none is compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options = parser.parse_args()
    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(f"there are no CPU kernels here: {kernels}")
    bundle = open_bundle(options.bundle)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in options.sides}
    results: dict[str, np.ndarray] = {}
    for round_ in range(options.rounds):
        for side in sorted(options.sides, reverse=bool(round_ % 2)):
            os.environ["SDC_KERNELS"] = SIDES[side]
            results[side] = time_steps(bundle, options.threads, options.steps, times[side])
    expected = time_steps(open_bundle(options.reference), options.threads, 0, []) if options.reference else None
    first = np.median(times[options.sides[0]], axis=0)[0]
    print(markdown_row("side", "s on the clock", "s of processor time", "ratio", "relative error"))
    print(markdown_row(*["---"] * 5))
    for side, seconds in times.items():
        clock, processor = np.median(seconds, axis=0)
        error = "" if expected is None else f"{np.linalg.norm(results[side] - expected) / np.linalg.norm(expected):.4f}"
        print(markdown_row(side, f"{clock:.3f}", f"{processor:.3f}", f"{clock / first:.2f}", error))


def time_steps(bundle: Bundle, threads: int, steps: int, times: list[tuple[float, float]]) -> np.ndarray:
    """Open the engine, run it once untimed and then `steps` times; the result, drawn from a fixed seed."""
    spec = bundle.manifest.components["unet"]
    generator = np.random.default_rng(0)
    sizes = {symbol: size.optimum for symbol, size in spec.dimensions.items()}
    feeds = {
        tensor.name: generator.standard_normal([sizes.get(str(size), size) for size in tensor.shape], np.float32)
        for tensor in spec.inputs
    }
    with bundle.load_session("unet", bundle.target("cpu"), threads=threads) as session:
        result = session.run(feeds)["out_sample"]
        for _ in range(steps):
            clock, processor = time.perf_counter(), time.process_time()
            session.run(feeds)
            times.append((time.perf_counter() - clock, time.process_time() - processor))
    return result


if __name__ == "__main__":
    main()
