"""`sdc optimize`: fuse the graph of any ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "fuse the graph of an .onnx file from any exporter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", type=Path, help="an .onnx file of opset 13 or later")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the optimised .onnx file")
    parser.add_argument(
        "--target", metavar="T", help="lower for it: cpu, ort-cpu, ort-cuda, rtx ... (keep the fused operators)"
    )
    parser.add_argument(
        "--low-rank",
        type=float,
        metavar="ENERGY",
        help="give each float32 weight the least rank that keeps this share of its squared singular values, for "
        "example 0.95, where two thin layers are less work than one (leave weights as they are)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what every pass did as JSON")


def run(args: argparse.Namespace) -> int:
    """Optimise, and print what was fused."""
    from sdc.compiler.build.built import weights_path
    from sdc.compiler.optimize import LOW_RANK_PHASE, optimize_file
    from sdc.compiler.plain_json import check_writable, write_json
    from sdc.compiler.text_table import format_table
    from sdc.engines.errors import InputError
    from sdc.engines.targets import parse_targets

    check_writable(args.report)
    targets = parse_targets(args.target) if args.target else (None,)
    if len(targets) > 1:
        raise InputError(f"{len(targets)} targets were given, an .onnx file can be for one", hint="run it for each")
    taken = {args.source: "source", args.out: "result", weights_path(args.out): "result's weights"}
    for path, what in taken.items():
        if args.report is not None and args.report.resolve() == path.resolve():
            raise InputError(f"{args.report} is the {what}", hint="choose another --report")
    done = optimize_file(args.source, args.out, targets[0], energy=args.low_rank)
    write_json(args.report, done.to_json())
    rows = [
        [phase, report.name, str(report.matched), str(report.nodes_before), str(report.nodes_after)]
        for phase, reports in done.phases.items()
        for report in reports
        if report.matched
    ]
    print(format_table(["phase", "pass", "matched", "nodes before", "after"], rows))
    others = [reports for phase, reports in done.phases.items() if phase != LOW_RANK_PHASE]
    skipped = {(each.name, skip) for reports in others for each in reports for skip in each.skipped}
    for name, skip in sorted(skipped, key=str):
        print(f"{name} left {skip.site}: {skip.reason}")
    if done.low_rank_text is not None:
        print(f"{done.low_rank_text}; --report says why others are not")
    print(f"{args.out} is written: {done.nodes_before} nodes before, {done.nodes_after} after")
    return 0
