"""`sdc eval`: how good a bundle's pictures are."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from sdc.compiler.cli.pictures import add_picture_arguments, add_shortcut_arguments, settings_from_arguments

SUMMARY = "measure a bundle's pictures against prompts, real pictures and a reference"

SAMPLES_OF_OTHER_MODELS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="the bundle to measure")
    parser.add_argument("--reference", type=Path, metavar="BUNDLE", help="compare with this one's pictures")
    parser.add_argument("--samples", type=int, help=f"pictures (5000 for tiny, {SAMPLES_OF_OTHER_MODELS} for others)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (0)")
    add_picture_arguments(parser)
    add_shortcut_arguments(parser)
    parser.add_argument("--target", help="which engines to run (the fastest that run here)")
    parser.add_argument("--batch", type=int, help="pictures at once (as many as the engines take)")
    parser.add_argument(
        "--noise-seeds", type=int, default=0, metavar="N", help="measure the seed noise with N more runs"
    )
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write a picture grid as PNG, prompts as rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the tables."""
    from sdc.compiler.evaluate.evaluate import evaluate
    from sdc.compiler.evaluate.grid import save_grid
    from sdc.compiler.evaluate.report import format_evaluation
    from sdc.compiler.evaluate.settings import JUDGED_MODEL
    from sdc.compiler.plain_json import check_writable, write_json
    from sdc.engines.bundle import open_bundle
    from sdc.engines.errors import InputError

    check_writable(args.json, args.grid)
    if args.noise_seeds < 0:
        raise InputError(f"--noise-seeds must be 0 or more, found {args.noise_seeds}")
    judged = open_bundle(args.bundle).manifest.model.name == JUDGED_MODEL
    settings = replace(
        settings_from_arguments(
            args,
            samples=args.samples if args.samples is not None else 5000 if judged else SAMPLES_OF_OTHER_MODELS,
            batch=args.batch,
        ),
        guidance_steps=args.guidance_steps,
        deepcache=args.deepcache,
        deepcache_center=args.deepcache_center,
    )
    evaluation = evaluate(
        args.bundle, args.reference, settings, noise_seeds=args.noise_seeds, progress=progress_on(sys.stderr)
    )
    write_json(args.json, evaluation.to_json())
    if args.grid is not None:
        save_grid(args.grid, args.bundle, args.reference, settings)
    print(format_evaluation(evaluation))
    return 0


def progress_on(stream: TextIO) -> Callable[[int, int], None]:
    """Shows how many pictures are done and how long the rest takes: one line on a terminal, else every tenth."""
    begin = time.monotonic()
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not stream.isatty() and done < total and 10 * done // total == 10 * shown // total:
            return
        shown = done
        left = (time.monotonic() - begin) / done * (total - done)
        end = "\n" if done == total or not stream.isatty() else ""
        start = "\r" if stream.isatty() else ""
        print(f"{start}{done} of {total} pictures, {left:.0f} s left ", end=end, file=stream, flush=True)

    return progress
