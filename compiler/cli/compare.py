"""`sdc compare`: two bundles or two ONNX files side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

SUMMARY = "compare two bundles or .onnx files: graphs, outputs, times and pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("first", type=Path, help="a bundle or an .onnx file; differences are relative to it")
    parser.add_argument("second", type=Path, help="likewise")
    parser.add_argument("--target", help="which engines of the bundles (the fastest that run here)")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="pictures to compare (4)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed calls of each engine (7)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and pictures (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the tables."""
    from sdc.compiler.compare.compare import compare
    from sdc.compiler.compare.report import format_comparison
    from sdc.engines.errors import InputError

    if args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, found {args.pictures}")
    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, found {args.rounds}")
    comparison = compare(
        args.first,
        args.second,
        target=args.target,
        pictures=args.pictures,
        rounds=args.rounds,
        seed=args.seed,
        say=lambda text: print(f"comparing {text}", file=sys.stderr),
    )
    if args.json is not None:
        args.json.write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    print(format_comparison(comparison))
    return 0
