"""`sdc plan`: the memory that a bundle takes for a picture, before it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sdc.compiler.cli.memory_limit import add_memory_limit

SUMMARY = "predict the memory of a bundle's engines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--height", type=int, metavar="PX", help="of the pictures (default: the model's own)")
    parser.add_argument("--width", type=int, metavar="PX", help="of the pictures (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="number of pictures at once (default: 1)")
    parser.add_argument(
        "--guidance", type=float, default=5.0, metavar="W", help="guidance weight; up to 1 there is none (default: 5)"
    )
    parser.add_argument("--deepcache", action="store_true", help="with the shallow UNet of `sdc run --deepcache N` too")
    parser.add_argument("--target", metavar="NAME", help="target of the bundle (default: all that it has)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it as JSON too; - for only that, on standard output"
    )
    parser.add_argument(
        "--no-prefetch",
        action="store_true",
        help="as `sdc run --no-prefetch` draws; always so with --memory-limit",
    )
    add_memory_limit(parser)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page with the buffers' lifetimes")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from sdc.compiler.compare.html_parts import write_page
    from sdc.compiler.memory.engine_plan import Request
    from sdc.compiler.memory.fit import fit_pictures, keeps_limits
    from sdc.compiler.memory.page import plan_page
    from sdc.compiler.memory.picture_plan import plan_pictures
    from sdc.compiler.memory.report import format_plan
    from sdc.compiler.plain_json import write_json
    from sdc.engines.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    settings = bundle.manifest.pipeline
    request = Request(
        height_px=settings.default_height_px if args.height is None else args.height,
        width_px=settings.default_width_px if args.width is None else args.width,
        pictures=args.batch,
        guidance_scale=args.guidance,
        deepcache=args.deepcache,
        prefetch=not args.no_prefetch,
    )
    targets = list(bundle.manifest.targets) if args.target is None else [args.target]
    value: dict[str, Any] = {"bundle": str(args.bundle)}
    if args.memory_limit is None:
        plans = [plan_pictures(bundle, target, request) for target in targets]
        conclusion = ""
    else:
        if args.target is None:  # where there are several, those that can keep it
            targets = [each for each in targets if keeps_limits(bundle, each)] or targets
        fits = [fit_pictures(bundle, target, request, args.memory_limit) for target in targets]
        plans = [plan for _, plan in fits]
        value["fits"] = {plan.target: fit.to_json() for fit, plan in fits}
        conclusion = "".join(f"\nmemory: {fit}" for fit, _ in fits)
    value["targets"] = [plan.to_json() for plan in plans]
    if args.report is not None:
        write_page(args.report, plan_page(str(args.bundle), plans))
    if args.json == Path("-"):
        print(json.dumps(value, indent=2))
        return 0
    write_json(args.json, value)
    print("\n\n".join(map(format_plan, plans)) + conclusion)
    return 0
