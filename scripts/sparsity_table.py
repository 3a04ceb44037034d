"""What zeros among the weights cost: `tiny` dense and 2:4 by either score, before and after recovery.

    python scripts/sparsity_table.py --data /usr/share/datasets/fashion-mnist --out build/sparse --threads 1

Prints a Markdown table of the SNR of the predicted noise on held-out pictures. Networks that are in the folder already
are not made again; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdc.compiler.compress.compress import compress
from sdc.compiler.compress.report import JSON_FILE
from sdc.compiler.compress.settings import CompressSettings, settings_for
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.distill.training_data import LATENTS
from sdc.compiler.distill.training_loop import Reporting
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.compiler.load import load_checkpoint
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
    print(markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS)), sep="\n", flush=True)
    for number, (sparsity, scores) in enumerate(ROWS):
        settings = replace(
            settings_for(JUDGED_MODEL), parameters=0.0, sparsity=sparsity, sparsity_scores=scores, **recovery
        )
        found = compressed(settings, options.data, options.out)
        sparse, recovered = (found["rounds"][-1][when] for when in ("sparse", "recovered"))
        if number == 0:
            print(markdown_row("dense", "", "0.0 %", f"{sparse['student_snr_db'] + sparse['lost_db']:.2f}", *[""] * 5))
        zeros = f"{100 * found['rounds'][-1]['sparsity']['zeros'] / found['parameters_after']:.1f} %"
        print(markdown_row(sparsity, scores, zeros, *cells(sparse), *cells(recovered)), flush=True)


def compressed(settings: CompressSettings, data: Path, out: Path) -> Any:
    """The report of a network with the settings, made now or in an earlier call."""
    name = f"{settings.sparsity}-{settings.sparsity_scores}".replace(":", "of")
    folder, work = out / name / JUDGED_MODEL, out / name / "work"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        latents = out / LATENTS  # encoded once for all rows
        if latents.exists() and not (work / LATENTS).exists():
            os.link(latents, work / LATENTS)
        reporting = Reporting(
            work,
            prompts_of_model(JUDGED_MODEL, 2),
            tell=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
        )
        compress(
            load_checkpoint(JUDGED_MODEL),
            TinyPictures(data, seed=settings.seed),
            settings,
            out=folder,
            reporting=reporting,
        )
        if not latents.exists():
            os.link(work / LATENTS, latents)
    return json.loads((folder / JSON_FILE).read_text())


def cells(quality: dict[str, Any]) -> list[str]:
    """The SNR, how much less it is than the dense network's, and the same at the worst timestep."""
    worst = max(row["lost_db"] for row in quality["timesteps"] if math.isfinite(row["lost_db"]))
    return [f"{quality['student_snr_db']:.2f}", f"{quality['lost_db']:.2f}", f"{worst:.2f}"]


if __name__ == "__main__":
    main()
