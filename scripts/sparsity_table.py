"""What zeros among the weights cost: `tiny` dense and 2:4 by either score, before and after recovery.

    python scripts/sparsity_table.py --data /usr/share/datasets/fashion-mnist --out build/sparse --threads 1

Prints a Markdown table of the SNR of the predicted noise on held-out pictures. Networks that are in the folder already
are not made again; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables.figures import print_headings
from tables.networks import compressed

from sdc.compiler.compress.settings import settings_for
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.evaluate.settings import JUDGED_MODEL
from sdc.compiler.text_table import markdown_row

ROWS = (("2:4", "magnitude"), ("2:4", "activation"))
"""Sparsity and scores."""

HEADINGS = (
    "weights",
    "scores",
    "zero",
    "SNR, dB",
    "less",
    "worst timestep",
    "SNR, recovered",
    "less",
    "worst timestep",
)


def main() -> None:
    """Compress for every row, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Debian's dataset-fashion-mnist")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--recover-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    recovery = {"recover_steps": options.recover_steps, "batch": options.batch}
    pictures = TinyPictures(options.data, seed=settings_for(JUDGED_MODEL).seed)
    print_headings(*HEADINGS)
    for number, (sparsity, scores) in enumerate(ROWS):
        settings = replace(
            settings_for(JUDGED_MODEL), parameters=0.0, sparsity=sparsity, sparsity_scores=scores, **recovery
        )
        name = f"{sparsity}-{scores}".replace(":", "of")
        _, found = compressed(name, settings, pictures, options.out)
        sparse, recovered = (found["rounds"][-1][when] for when in ("sparse", "recovered"))
        if number == 0:
            print(markdown_row("dense", "", "0.0 %", f"{sparse['student_snr_db'] + sparse['lost_db']:.2f}", *[""] * 5))
        zeros = f"{100 * found['rounds'][-1]['sparsity']['zeros'] / found['parameters_after']:.1f} %"
        print(markdown_row(sparsity, scores, zeros, *cells(sparse), *cells(recovered)), flush=True)


def cells(quality: dict[str, Any]) -> list[str]:
    """The SNR, how much less it is than the dense network's, and the same at the worst timestep."""
    worst = max(row["lost_db"] for row in quality["timesteps"] if math.isfinite(row["lost_db"]))
    return [f"{quality['student_snr_db']:.2f}", f"{quality['lost_db']:.2f}", f"{worst:.2f}"]


if __name__ == "__main__":
    main()
