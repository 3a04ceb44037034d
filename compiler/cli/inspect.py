"""`sdc inspect`: what is in a bundle or an engine file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sdc.engines.errors import InputError
from sdc.engines.manifest import MANIFEST_NAME

SUMMARY = "describe a bundle, an .onnx, an OpenVINO .xml, a .plan or a calibration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", type=Path, help="a bundle's folder, an engine file or a calibration/unet.json")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it as JSON too; - for only that, on standard output"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a calibration's ranges as an HTML page")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    from sdc.compiler.inspect.inspect import BundleDescription, find_origin, inspect_path
    from sdc.compiler.inspect.report import format_bundle, format_engine, format_origin
    from sdc.compiler.plain_json import write_json

    if args.path.suffix == ".json" and args.path.name != MANIFEST_NAME:
        return _run_calibration(args)
    if args.report is not None:
        raise InputError("--report is for calibrations", hint="give a bundle's calibration/unet.json")
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


def _run_calibration(args: argparse.Namespace) -> int:
    from sdc.compiler.compare.html_parts import write_page
    from sdc.compiler.inspect.calibration_file import format_calibration, inspect_calibration
    from sdc.compiler.inspect.calibration_page import calibration_page
    from sdc.compiler.plain_json import finite_json, write_json

    description = inspect_calibration(args.path)
    if args.report is not None:
        write_page(args.report, calibration_page(description))
    value = finite_json(description.to_json())
    if args.json == Path("-"):
        print(json.dumps(value, indent=2))
        return 0
    write_json(args.json, value)
    print(format_calibration(description))
    return 0
