"""A step of a bundle's UNet on the target cpu, with the CPU kernels and without, in turn.

    sdc export --model sd15 --weights random --precision fp16 --target cpu --out build/sd15-fp16
    python scripts/bench_kernels_in_unet.py build/sd15-fp16 --threads 1

Only one side is in memory at a time: each round opens both, one after the other. Medians over all steps, in seconds, of
the time on the clock and of the processor's time, which other programs do not disturb as much; and how far the two
sides' results are from each other.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np

from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.kernels.library import find_kernels

SIDES = {"OpenVINO": "0", "kernels": "1"}
"""Values of SDC_KERNELS."""


def main() -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options = parser.parse_args()
    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(f"there are no CPU kernels here: {kernels}")
    bundle = open_bundle(options.bundle)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    results: dict[str, np.ndarray] = {}
    for round_ in range(options.rounds):
        for side in sorted(SIDES, reverse=bool(round_ % 2)):
            os.environ["SDC_KERNELS"] = SIDES[side]
            results[side] = time_steps(bundle, options.threads, options.steps, times[side])
    for side, seconds in times.items():
        clock, processor = np.median(seconds, axis=0)
        print(f"{side}: {clock:.3f} s on the clock, {processor:.3f} s of processor time")
    first, second = results.values()
    print(f"relative difference of the results: {np.linalg.norm(second - first) / np.linalg.norm(first):.4f}")


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
