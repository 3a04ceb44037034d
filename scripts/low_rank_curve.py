"""What weights of low rank cost: `tiny`'s predictions against the multiply-adds of a step, by either choice of ranks.

    pip install -e ".[bench]"
    python scripts/low_rank_curve.py --data /usr/share/datasets/fashion-mnist --out build/low-rank --threads 1

Nothing recovers. The SNR is of the predicted noise on held-out pictures; multiply-adds are those with weights in the
UNet's exported engine. Writes a table to the standard output and a plot, `curve.svg`; networks that are in the folder
already are not made again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from tables.figures import print_headings
from tables.macs import UNET, count_macs
from tables.networks import compressed, exported

from sdc.compiler.compress.settings import Moments, settings_for
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.evaluate.settings import JUDGED_MODEL
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle

ENERGIES = (0.999, 0.99, 0.98, 0.95, 0.9, 0.8)


def main() -> None:
    """Factorise for every energy and choice, count, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Debian's dataset-fashion-mnist")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--energies", type=float, nargs="+", default=list(ENERGIES), help="that layers keep")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    base = settings_for(JUDGED_MODEL)
    pictures = TinyPictures(options.data, seed=base.seed)
    whole = weight_macs(exported(JUDGED_MODEL, options.out / "whole"))
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    print_headings("ranks by", "energy", "layers", "multiply-adds", "SNR, dB", "less")
    for by in get_args(Moments):
        for energy in options.energies:
            settings = replace(base, parameters=0.0, recover_steps=0, low_rank=str(energy), low_rank_by=by)
            name = f"{by}-{energy:g}"
            folder, report = compressed(name, settings, pictures, options.out)
            found: dict[str, Any] = report["rounds"][-1]
            share = weight_macs(exported(str(folder), options.out / name / "bundle")) / whole
            quality = found["in low rank"]
            curves[by].append((share, quality["lost_db"]))
            cells = (f"{len(found['low_rank']['layers'])}", f"{100 * share:.1f} %")
            snr = (f"{quality['student_snr_db']:.2f}", f"{quality['lost_db']:.2f}")
            print(markdown_row(by, f"{energy:g}", *cells, *snr), flush=True)
    plot(curves, options.out / "curve.svg")


def weight_macs(bundle: Path) -> int:
    """Multiply-adds with weights of a step at the bundle's own sizes, without what runs once a picture."""
    spec = open_bundle(bundle, verify=False).manifest.components[UNET]
    return count_macs(bundle, {symbol: size.optimum for symbol, size in spec.dimensions.items()})[0]


def plot(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """The SNR that is lost by multiply-adds, a line for each choice."""
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    figure, panel = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for by, points in curves.items():
        panel.plot([100 * share for share, _ in points], [lost for _, lost in points], "o-", label=by)
    panel.set(xlabel="multiply-adds with weights, % of all ranks", ylabel="SNR, less by dB", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend(title="ranks by")
    figure.savefig(path)


if __name__ == "__main__":
    main()
