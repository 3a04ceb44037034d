"""Figures of a bundle's pictures for a table: measured once, kept until what they depend on changes."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.evaluate.statistics import MODELS_FOLDER
from sdc.compiler.evaluate.stored_runs import run_digest
from sdc.compiler.evaluate.verdicts import digest_of
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle

FIGURES = {"frechet_to_real": (1, 2), "garment": (100, 2), "colour": (100, 2)}
"""What is measured of pictures, with factor and decimals in tables."""

HEADINGS = ("Fréchet to real", "garment, %", "colour, %")
"""Of `FIGURES`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `figure_cells` needs to know of the pictures."""
    parser.add_argument("--samples", type=int, default=1000, help="pictures of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of pictures with different seeds")
    parser.add_argument("--guidance", type=float, default=1.9)
    parser.add_argument("--threads", type=int)


def drawing(options: argparse.Namespace) -> Settings:
    """How pictures are drawn for a table, on the target cpu."""
    return Settings(samples=options.samples, guidance_scale=options.guidance, target="cpu", threads=options.threads)


def figure_cells(bundle: Path, settings: Settings, seeds: int, kept: Path) -> list[str]:
    """`FIGURES` of a bundle over seeds, as cells of a table: mean, and standard deviation where there are several.

    Args:
        bundle: its folder.
        settings: of the pictures; the target is named.
        seeds: runs, from seed 0.
        kept: folder of the figures.
    """
    runs = [absolute_figures(bundle, replace(settings, seed=seed), kept) for seed in range(seeds)]
    return [_written([run[name] for run in runs], *FIGURES[name]) for name in FIGURES]


def absolute_figures(bundle: Path, settings: Settings, kept: Path) -> Mapping[str, float]:
    """The figures of one run, made now or in an earlier call; see `figure_cells`."""
    measures = [digest_of(MODELS_FOLDER / f"{name}.safetensors") for name in ("judge", "statistics")]
    digest = run_digest(open_bundle(bundle).manifest, str(settings.target), measures)
    how = f"{settings.sampler}-{settings.steps}-{settings.guidance_scale:g}-{settings.samples}-{settings.seed}"
    rest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:8]
    path = kept / f"{digest}-{how}-{rest}.json"
    if not path.exists():
        print(f"{bundle.name}: {settings.samples} pictures, {how}", file=sys.stderr, flush=True)
        evaluation = evaluate(bundle, None, settings)
        kept.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({each.name: each.bundle.value for each in evaluation.absolute}) + "\n")
        unfinished.replace(path)
    figures: dict[str, float] = json.loads(path.read_text())
    return figures


def print_headings(*headings: str) -> None:
    """The first two lines of a Markdown table."""
    print(markdown_row(*headings), markdown_row(*["---"] * len(headings)), sep="\n", flush=True)


def _written(values: Sequence[float], factor: int, decimals: int) -> str:
    spread = f" ± {factor * np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{factor * np.mean(values):.{decimals}f}{spread}"
