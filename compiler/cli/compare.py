"""`sdc compare`: two bundles or two ONNX files side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "compare two bundles or .onnx files: graphs, outputs, times and pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("first", type=Path, help="a bundle or an .onnx file; differences are relative to it")
    parser.add_argument("second", type=Path, help="likewise")
    parser.add_argument("--target", help="which engines of the bundles (the fastest that run here)")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="pictures to compare (4)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of each picture (20)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines (all)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed calls of each engine (7)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and pictures (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the tables."""
    from sdc.compiler.compare.compare import compare
    from sdc.compiler.compare.report import format_comparison
    from sdc.compiler.evaluate.settings import Settings
    from sdc.compiler.plain_json import check_writable, write_json
    from sdc.engines.errors import InputError

    check_writable(args.json)
    if args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, found {args.pictures}")
    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, found {args.rounds}")
    comparison = compare(
        args.first,
        args.second,
        Settings(
            samples=max(1, args.pictures),
            seed=args.seed,
            steps=args.steps,
            target=args.target,
            threads=args.threads,
        ),
        rounds=args.rounds,
        pictures=args.pictures > 0,
        say=lambda text: print(f"comparing {text}", file=sys.stderr),
    )
    write_json(args.json, comparison.to_json())
    print(format_comparison(comparison))
    return 0
