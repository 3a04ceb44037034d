"""`sdc compare`: two bundles or two ONNX files side by side, or one model after each of its passes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdc.compiler.cli.pictures import add_picture_arguments, settings_from_arguments

if TYPE_CHECKING:
    from sdc.compiler.compare.exported import ExportedGraph
    from sdc.engines.targets import Target

SUMMARY = "compare two bundles or .onnx files, or a model before and after every pass"

DEFAULT_PICTURES = 4
DEFAULT_TARGET = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("first", type=Path, nargs="?", help="a bundle or an .onnx file; differences are relative to it")
    parser.add_argument("second", type=Path, nargs="?", help="likewise")
    parser.add_argument("--target", help=f"which engines (the fastest that run here; of --model: {DEFAULT_TARGET})")
    parser.add_argument(
        "--pictures", type=int, metavar="N", help=f"pictures to compare ({DEFAULT_PICTURES}, or as many as prompts)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="of the pictures, one a line (the model's own)")
    add_picture_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed calls of each engine (7)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, pictures and random weights (0)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page that stands alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    passes = parser.add_argument_group("one model, pass by pass")
    which = passes.add_mutually_exclusive_group()
    which.add_argument("--ablate", action="store_true", help="what every pass is worth, cumulatively")
    which.add_argument("--bisect", action="store_true", help="the first pass after which the outputs differ")
    passes.add_argument("--model", help="what is compiled: as for `sdc export`, or an .onnx file")
    passes.add_argument("--component", default="unet", help="text_encoder, unet, vae_decoder or vae_encoder (unet)")
    passes.add_argument("--weights", choices=("trained", "random"), default="trained", help="as for `sdc export`")
    passes.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "int8"),
        help="of the engines, calibrated as by `sdc export`, without its float32 islands; errors are against the graph "
        "as exported (fp32)",
    )
    passes.add_argument(
        "--tolerance",
        type=float,
        help="of --bisect: largest relative error (1e-5); fp16 and int8 need a larger one, or are what is found",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, and print the tables."""
    from sdc.compiler.plain_json import check_writable

    _check(args)
    check_writable(args.json, args.report)
    if args.ablate:
        return _ablate(args)
    return _bisect(args) if args.bisect else _compare(args)


def _check(args: argparse.Namespace) -> None:
    from sdc.engines.errors import InputError

    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, found {args.rounds}")
    if args.pictures is not None and args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, found {args.pictures}")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads must be 1 or more, found {args.threads}")
    if args.ablate or args.bisect:
        if args.model is None or args.first is not None:
            raise InputError("--ablate and --bisect take a model and no bundles", hint="name it with --model")
    elif args.model is not None:
        raise InputError("--model alone says nothing to compare", hint="add --ablate or --bisect")
    elif args.first is None or args.second is None:
        raise InputError(
            "two sides are needed to compare", hint="give two bundles or .onnx files, or --ablate with --model"
        )
    if args.tolerance is not None and not args.bisect:
        raise InputError("--tolerance is the tolerance of --bisect", hint="add --bisect, or leave it out")
    if args.report is not None and args.bisect:
        raise InputError("--bisect has no HTML report", hint="use --json")


def _compare(args: argparse.Namespace) -> int:
    from sdc.compiler.compare.compare import compare
    from sdc.compiler.compare.report import format_comparison
    from sdc.compiler.export_plan import read_prompts
    from sdc.compiler.plain_json import write_json

    prompts = None if args.prompts is None else read_prompts(args.prompts)
    pictures = args.pictures if args.pictures is not None else len(prompts or ()) or DEFAULT_PICTURES
    comparison = compare(
        args.first,
        args.second,
        settings_from_arguments(args, samples=max(1, pictures)),
        rounds=args.rounds,
        pictures=pictures > 0,
        prompts=prompts,
        say=lambda text: _say(f"comparing {text}"),
    )
    write_json(args.json, comparison.to_json())
    if args.report is not None:
        from sdc.compiler.compare.comparison_page import comparison_page
        from sdc.compiler.compare.html_parts import write_page

        write_page(args.report, comparison_page(comparison))
    print(format_comparison(comparison))
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from sdc.compiler.compare.ablation import ablate
    from sdc.compiler.compare.pass_report import format_ablation
    from sdc.compiler.plain_json import write_json

    graph, target = _graph(args)
    ablation = ablate(
        graph,
        target,
        precision=args.precision,
        rounds=args.rounds,
        threads=args.threads,
        seed=args.seed,
        say=_say,
    )
    write_json(args.json, ablation.to_json())
    if args.report is not None:
        from sdc.compiler.compare.ablation_page import ablation_page
        from sdc.compiler.compare.html_parts import write_page

        write_page(args.report, ablation_page(ablation))
    print(format_ablation(ablation))
    return 0


def _bisect(args: argparse.Namespace) -> int:
    from sdc.compiler.compare.bisection import DEFAULT_TOLERANCE, bisect_passes
    from sdc.compiler.compare.pass_report import format_bisection
    from sdc.compiler.compare.variants import all_phases, is_hoisted
    from sdc.compiler.plain_json import write_json

    graph, target = _graph(args)
    bisection = bisect_passes(
        graph,
        all_phases(graph.spec.name, args.precision, target, table=graph.table),
        target,
        tolerance=DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance,
        seed=args.seed,
        threads=args.threads,
        hoist=is_hoisted(graph),
        report=_say,
    )
    write_json(args.json, bisection.to_json())
    print(format_bisection(bisection))
    return 0


def _graph(args: argparse.Namespace) -> tuple[ExportedGraph, Target]:
    """The graph to start from, exported if it was not yet, and what it is compiled for."""
    from sdc.compiler.cli.progress import show_progress
    from sdc.compiler.compare.exported import exported_graph
    from sdc.compiler.stages import Source
    from sdc.compiler.workshop.cache import StageCache
    from sdc.engines.environment import cache_folder
    from sdc.engines.errors import InputError
    from sdc.engines.targets import parse_targets

    targets = parse_targets(args.target or DEFAULT_TARGET)
    if len(targets) > 1:
        raise InputError(f"one target at a time, found {args.target}")
    source = Source(model=args.model, weights=args.weights, seed=args.seed if args.weights == "random" else 0)
    with show_progress() as progress:
        graph = exported_graph(
            source,
            args.component,
            targets[0],
            precision=args.precision,
            cache=StageCache(cache_folder() / "stages"),
            progress=progress,
        )
    return graph, targets[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
