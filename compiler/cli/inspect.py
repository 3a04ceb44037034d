"""`sdc inspect`: what is in a bundle or an engine file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "describe a bundle, an .onnx, an OpenVINO .xml or a .plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", type=Path, help="a bundle's folder or an engine file")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it as JSON too; - for only that, on standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    from sdc.compiler.inspect.inspect import BundleDescription, find_origin, inspect_path
    from sdc.compiler.inspect.report import format_bundle, format_engine, format_origin
    from sdc.compiler.plain_json import write_json

    description = inspect_path(args.path)
    value = description.to_json()
    if isinstance(description, BundleDescription):
        text = format_bundle(description, every_tensor=args.verbose)
    else:
        text = format_engine(description)
        origin = find_origin(args.path)
        if origin is not None:
            text += "\n\n" + format_origin(*origin, every_tensor=args.verbose)
    if args.json == Path("-"):
        print(json.dumps(value, indent=2))
        return 0
    write_json(args.json, value)
    print(text)
    return 0
