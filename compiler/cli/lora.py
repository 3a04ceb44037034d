"""`sdc lora`: a bundle with other LoRAs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdc.compiler.lora import LoraChange

SUMMARY = "make a bundle with other LoRAs out of a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, help="made by `sdc export` or `sdc lora`; it stays as it is")
    parser.add_argument(
        "--add", action="append", default=[], metavar="FILE[:SCALE]", help="fold a LoRA in, behind those that are there"
    )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="FILE", help="leave one out, by its name or path"
    )
    parser.add_argument("--clear", action="store_true", help="leave out all that are there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new bundle; nothing may be there")


def run(args: argparse.Namespace) -> int:
    """Make the bundle; the summary goes to standard output, progress to standard error."""
    from sdc.compiler.lora import LoraChange

    change = LoraChange(add=tuple(args.add), remove=tuple(args.remove), clear=args.clear)
    print(make_bundle(args.bundle, change, args.out, verbose=args.verbose))
    return 0


def make_bundle(bundle: Path, change: LoraChange, out: Path, *, verbose: bool) -> str:
    """A bundle with other LoRAs at `out`, with progress on standard error; returns the summary for people."""
    from sdc.compiler.cli.export import summary_text
    from sdc.compiler.cli.progress import show_progress
    from sdc.compiler.compile import export_bundle
    from sdc.compiler.lora import request_with_loras

    request = request_with_loras(bundle, change, out)
    with show_progress() as progress:
        return summary_text(export_bundle(request, progress=progress, verbose=verbose))
