"""`tiny` with fewer channels: what its predictions and its pictures lose, before recovery and after it.

    python scripts/smaller_table.py --data /usr/share/datasets/fashion-mnist --out build/smaller --threads 1

The SNR is of the predicted noise on held-out pictures; every network is exported in float32 for the target cpu and
draws `--samples` pictures of the same prompts and seeds. Networks, bundles and figures that are in the folder already
are not made again; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables.figures import HEADINGS, add_arguments, drawing, figure_cells, print_headings
from tables.networks import compressed, exported

from sdc.compiler.compress.settings import settings_for
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.evaluate.settings import JUDGED_MODEL
from sdc.compiler.text_table import markdown_row

ROWS: tuple[tuple[Any, Any], ...] = (
    ("fisher", "sensitivity"),
    ("fisher", "uniform"),
    ("taylor", "uniform"),
    ("magnitude", "uniform"),
)
"""Importance and budgets."""


def main() -> None:
    """Compress for every row, with recovery and without, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Debian's dataset-fashion-mnist")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--parameters", type=float, default=0.41, help="share that goes, in one round")
    parser.add_argument("--recover-steps", type=int, nargs="+", default=[0, 600], help="of a row each")
    parser.add_argument("--batch", type=int, default=32)
    add_arguments(parser)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    base = replace(settings_for(JUDGED_MODEL), parameters=options.parameters, rounds=1, batch=options.batch)
    pictures = TinyPictures(options.data, seed=base.seed)

    def pictured(bundle: Path) -> list[str]:
        return figure_cells(bundle, drawing(options), options.seeds, options.out / "figures")

    print_headings("importance", "budgets", "parameters", "steps of recovery", "SNR, less, dB", *HEADINGS)
    whole = exported(JUDGED_MODEL, options.out / "whole")
    print(markdown_row("all channels", "", "0.0 %", "", "", *pictured(whole)), flush=True)
    for importance, budgets in ROWS:
        for steps in options.recover_steps:
            settings = replace(base, importance=importance, budgets=budgets, recover_steps=steps)
            name = f"{importance}-{budgets}-{steps}"
            folder, report = compressed(name, settings, pictures, options.out)
            quality = report["rounds"][-1]["recovered" if steps else "pruned"]
            cells = (f"{-100 * report['removed_share']:.1f} %", str(steps), f"{quality['lost_db']:.2f}")
            bundle = exported(str(folder), options.out / name / "bundle")
            print(markdown_row(importance, budgets, *cells, *pictured(bundle)), flush=True)


if __name__ == "__main__":
    main()
