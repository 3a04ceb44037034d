"""`sdc compress restore`: elastic channels of a bundle that are switched on for other prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "switch channels on that `sdc compress --elastic` left in a bundle, where that pays for some prompts"

OPTIONS = frozenset({"threads"})
"""What it takes from before its name as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, help="exported from a folder of `sdc compress --elastic`; stays as it is")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="like those it shall draw, one a line"
    )
    parser.add_argument(
        "--out", type=Path, required=True, dest="bundle_out", metavar="DIR", help="the new bundle; nothing may be there"
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        help="where the channels' weights are written as a LoRA, which `sdc lora --remove FILE` takes away again "
        "(OUT.restored.safetensors)",
    )
    parser.add_argument("--threads", type=int, default=argparse.SUPPRESS, help="CPU threads (all)")


def run(args: argparse.Namespace) -> int:
    """Restore; what was found goes to standard output, progress to standard error."""
    from sdc.compiler.cli.lora import make_bundle
    from sdc.compiler.cli.training_arguments import set_threads
    from sdc.compiler.compress.restore import restore
    from sdc.compiler.export_plan import read_prompts
    from sdc.compiler.lora import LoraChange

    set_threads(args.threads)
    out = args.bundle_out.absolute()
    lora = args.lora or out.with_name(f"{out.name}.restored.safetensors")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = restore(args.bundle, read_prompts(args.prompts), out=args.bundle_out, lora=lora, tell=tell)
    print(found.to_text(), end="")
    if not found.chosen:
        return 0
    try:
        summary = make_bundle(args.bundle, LoraChange(add=(f"{lora}:1",)), args.bundle_out, verbose=args.verbose)
    except BaseException:
        tell(f"what was found is in {lora}; to go on: sdc lora {args.bundle} --add {lora} --out {args.bundle_out}")
        raise
    print(f"{summary}\nto undo: sdc lora {args.bundle_out} --remove {lora} --out DIR")
    return 0
