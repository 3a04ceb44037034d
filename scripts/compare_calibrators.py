"""Every way to calibrate int8 against fp32 at equal seeds: one row of a table each.

    python scripts/compare_calibrators.py --out build/calibrators
    python scripts/compare_calibrators.py --out build/calibrators-planted --model build/planted/tiny

Exports a bundle for each variant (stages that variants share are computed once), compares its pictures with those of
the fp32 bundle, and prints Markdown. The known-bad end of the scale is in docs/results/quality.md.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np

from sdc.compiler.calibration.options import DEFAULT_CALIBRATION, CalibrationOptions
from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.engines.targets import ONNXRUNTIME, Target, parse_targets
from sdc.passes.precision.range_rules import DYNAMIC, METHODS, parse_rule
from sdc.passes.precision.smoothing_rule import parse_smoothing


def main() -> None:
    """Parse the command line, export, evaluate and print."""
    parser = argparse.ArgumentParser(description="compare calibrators of int8")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles and the table")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=1.9)
    parser.add_argument("--seed", type=int, default=0, help="of the run; another one has pictures of other seeds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone, by the names in the table")
    arguments = parser.parse_args()
    reference = arguments.out / "fp32"
    source, targets = Source(arguments.model), parse_targets(arguments.target)
    export_bundle(ExportRequest(source, PrecisionRequest("fp32"), targets, reference))
    settings = Settings(samples=arguments.samples, seed=arguments.seed, guidance_scale=arguments.guidance)
    rows = []
    print("| int8 variant | PSNR, dB | worst 5 % | epsilon error | at the first / last timestep |")
    print("|---|---|---|---|---|")
    chosen = variants(targets)
    for name in arguments.only or chosen:
        if name not in chosen:
            parser.error(f"no variant is named {name!r}; there are: {', '.join(map(repr, chosen))}")
    for name, options in chosen.items():
        if arguments.only and name not in arguments.only:
            continue
        bundle = arguments.out / "int8"
        export_bundle(ExportRequest(source, PrecisionRequest("int8"), targets, bundle, calibration=options))
        found = evaluate(bundle, reference, settings)
        psnr = next(row for row in found.paired if "psnr" in row.name)
        errors = [row.error for row in found.epsilon if row.error is not None]
        mean = float(np.sqrt(np.mean(np.square(errors))))
        rows.append({"name": name, "psnr_db": psnr.value.value, "noise": psnr.value.noise, "epsilon": errors})
        print(
            f"| {name} | {psnr.value.value:.2f} ± {psnr.value.noise or 0:.2f} | {psnr.worst_5_percent:.2f} "
            f"| {mean:.5f} | {errors[-1]:.5f} / {errors[0]:.5f} |",
            flush=True,
        )
        (arguments.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def variants(targets: tuple[Target, ...]) -> dict[str, CalibrationOptions]:
    """Options by the name of their row."""
    found = {}
    for symmetric, method in product((True, False), METHODS):
        label = parse_rule(method, symmetric=symmetric).label
        found[f"{label}; plain"] = CalibrationOptions(method, symmetric, smoothing=None, correct_bias=False)
    for symmetric, method in product((True, False), ("max", "mse", "lp")):
        label = parse_rule(method, symmetric=symmetric).label
        for smoothing in ("none", "0.3:1", "0.5:1", "0.7:1", "0.5:4"):
            smoothed = "not smoothed" if smoothing == "none" else f"smoothed {smoothing}"
            for correct in (True,) if smoothing == "none" else (False, True):  # without both it is plain
                options = CalibrationOptions(
                    method, symmetric, smoothing=parse_smoothing(smoothing), correct_bias=correct
                )
                found[f"{label}; {smoothed}{', bias corrected' if correct else ''}"] = options
    if all(target.backend == ONNXRUNTIME for target in targets):
        found["dynamic"] = CalibrationOptions(DYNAMIC)
    found["default, 20 steps"] = DEFAULT_CALIBRATION
    for steps in (1, 2, 4, 8):
        found[f"default, {steps} steps evenly spread"] = CalibrationOptions(steps=steps)
        found[f"default, {steps} of 20 steps by drift"] = CalibrationOptions(timesteps=steps)
    return found


if __name__ == "__main__":
    main()
