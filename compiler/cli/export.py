"""`sdc export`: compile a checkpoint into a bundle of engines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdc.compiler.byte_sizes import gibibytes
from sdc.compiler.cli.calibration_arguments import add_calibration_arguments, calibration_options
from sdc.compiler.cli.memory_limit import add_memory_limit
from sdc.engines.errors import InputError
from sdc.engines.specs import is_shard_name
from sdc.engines.targets import parse_targets

if TYPE_CHECKING:
    from sdc.compiler.compile import ExportSummary
    from sdc.compiler.export_plan import ExportRequest
    from sdc.compiler.precision.planning import PrecisionRequest

SUMMARY = "compile a checkpoint into a bundle of engines"

DEFAULT_PRECISION = "fp16"
DEFAULT_TARGETS = "cpu,rtx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model",
        required=True,
        help='"tiny", "sd15", another id on the hub, a diffusers folder, a .safetensors checkpoint, or a folder of '
        "ONNX graphs that optimum exported",
    )
    parser.add_argument(
        "--precision",
        default=DEFAULT_PRECISION,
        metavar="fp32|fp16|bf16|int8|w8|w4|fp8|auto|PLAN.toml",
        help="of weights and arithmetic; int8, fp8 and the weight-only w8 and w4 are for the UNet and leave the rest "
        f"in fp16; a bundle's precision/unet.toml can be edited and given back ({DEFAULT_PRECISION})",
    )
    parser.add_argument(
        "--quality-budget",
        metavar="N[dB]|fd=N",
        help="of --precision auto: the least PSNR of pictures to float32's, or the largest Fréchet distance (of tiny); "
        "layers are int8 where it allows and where that is faster",
    )
    parser.add_argument(
        "--target",
        default=DEFAULT_TARGETS,
        metavar="T[,T...]",
        help=f"what to build engines for: cpu, ort-cpu, ort-cuda, rtx, sm75 ... sm121, sm86+sm89 ({DEFAULT_TARGETS})",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="fold a LoRA into the weights; several add up",
    )
    parser.add_argument(
        "--weights", choices=("trained", "random"), default="trained", help="random: the architecture, no download"
    )
    parser.add_argument("--seed", type=int, help="of --weights random (0)")
    parser.add_argument(
        "--config", type=Path, metavar="FOLDER", help="configurations of a .safetensors checkpoint of unusual size"
    )
    parser.add_argument("--no-fuse", action="store_true", help="keep the plain graph, to compare with")
    parser.add_argument(
        "--no-hoist", action="store_true", help="leave all work in the UNet: its inputs are those that optimum knows"
    )
    parser.add_argument(
        "--deepcache",
        type=int,
        nargs="?",
        const=0,
        metavar="DEPTH",
        help="also build the shallow UNet that `sdc run --deepcache N` draws most steps with; DEPTH counts skip "
        "connections from the output, and the smallest is the fastest (0)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="cut the UNet into N engines, of which one or two are in memory at a time: slower, for machines with less "
        "memory than the UNet takes",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle (build/MODEL-PRECISION)")
    add_memory_limit(
        parser,
        "what all processes together may hold, as 8GiB, pages of mapped files aside; a stage that needs more is ended, "
        "and what to change is said (default: no limit)",
    )
    add_calibration_arguments(parser)
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("-"),
        metavar="FILE",
        help="write a summary for machines; without FILE, print only that on the standard output",
    )


def run(args: argparse.Namespace) -> int:
    """Export; the summary goes to standard output, progress to standard error."""
    from sdc.compiler.cli.progress import show_progress
    from sdc.compiler.compile import export_bundle

    request = request_from_arguments(args)
    with show_progress() as progress:
        summary = export_bundle(request, progress=progress, verbose=args.verbose)
    report = json.dumps(summary_json(summary), indent=2)
    if args.json is not None and args.json != Path("-"):
        args.json.write_text(report + "\n", encoding="utf-8")
    print(report if args.json == Path("-") else summary_text(summary))
    return 0


def request_from_arguments(args: argparse.Namespace) -> ExportRequest:
    """Complete and check the arguments.

    Raises:
        InputError: an argument makes no sense, alone or with the others.
    """
    from sdc.compiler.export_plan import ExportRequest
    from sdc.compiler.stages import Source

    if args.seed is not None and args.weights != "random":
        raise InputError("--seed is the seed of random weights", hint="add --weights random, or leave it out")
    precision = _precision_request(args.precision, args.quality_budget)
    return ExportRequest(
        source=Source(
            model=args.model,
            weights=args.weights,
            seed=args.seed or 0,
            loras=tuple(args.lora),
            config=args.config,
        ),
        precision=precision,
        targets=parse_targets(args.target),
        out=args.out or Path("build", f"{short_name(args.model)}-{precision.name}"),
        fuse=not args.no_fuse,
        hoist=not args.no_hoist,
        calibration=calibration_options(args),
        deepcache=args.deepcache,
        shards=args.shards,
        memory_limit_bytes=args.memory_limit,
    )


def _precision_request(text: str, budget: str | None) -> PrecisionRequest:
    from sdc.compiler.precision.budget import parse_budget
    from sdc.compiler.precision.planning import PrecisionRequest
    from sdc.passes.pipeline import MIXED
    from sdc.passes.precision.plan_file import read_plan

    plan = read_plan(Path(text)) if text.endswith(".toml") else None
    return PrecisionRequest(text if plan is None else MIXED, plan, None if budget is None else parse_budget(budget))


def short_name(model: str) -> str:
    """Last part of a hub id or a path, without the suffix of a checkpoint."""
    return Path(model).resolve().name.removesuffix(".safetensors") or "model"


def summary_json(summary: ExportSummary) -> dict[str, Any]:
    """The summary for machines."""
    manifest = summary.manifest
    return {
        "bundle": str(summary.out),
        "model": manifest.model.name,
        "precision": manifest.precision,
        "targets": list(manifest.targets),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "engine_bytes": {
            target: {
                name: sum(manifest.files[file].bytes for file in engine.files) for name, engine in entry.engines.items()
            }
            for target, entry in manifest.targets.items()
        },
        "up_to_date": summary.up_to_date,
        "seconds": round(sum(record.seconds for record in summary.records), 3),
        "peak_memory_bytes": max(record.peak_memory_bytes for record in summary.records),
        **_held(summary),
        "stages": [
            {
                "name": record.name,
                "seconds": round(record.seconds, 3),
                "peak_memory_bytes": record.peak_memory_bytes,
                "cached": record.cached,
                **({} if record.held_bytes is None else {"held_bytes": record.held_bytes}),
            }
            for record in summary.records
        ],
    }


def _held(summary: ExportSummary) -> dict[str, Any]:
    """With a limit: it, what was held at most and in which stage."""
    watched = {record.name: record.held_bytes for record in summary.records if record.held_bytes is not None}
    if summary.memory_limit_bytes is None or not watched:
        return {}
    stage = max(watched, key=lambda name: watched[name])
    return {"memory_limit_bytes": summary.memory_limit_bytes, "held_bytes": watched[stage], "held_in_stage": stage}


def summary_text(summary: ExportSummary) -> str:
    """The summary for people."""
    values = summary_json(summary)
    state = "was up to date" if summary.up_to_date else "is written"
    unet = ", ".join(f"{_unet_bytes(each) / 1e6:.1f} MB for {name}" for name, each in values["engine_bytes"].items())
    return (
        f"{_relative(summary.out)} {state}: {values['model']}, {values['precision']}, "
        f"for {', '.join(values['targets'])}; {values['bytes'] / 1e6:.1f} MB (UNet {unet}), {values['seconds']:.1f} s\n"
        f"{_held_text(values)}"
        f'next: sdc run {_relative(summary.out)} --prompt "..."{_sampling(summary)}'
    )


def _held_text(values: dict[str, Any]) -> str:
    if "held_bytes" not in values:
        return ""
    held, limit = gibibytes(values["held_bytes"]), gibibytes(values["memory_limit_bytes"])
    return f"memory: {held} of {limit} held, in the stage {values['held_in_stage']!r}\n"


def _sampling(summary: ExportSummary) -> str:
    """How to draw with a model of few steps; a LoRA for them has its guidance inside."""
    if summary.few_steps:
        return " --sampler lcm --steps 4 --guidance 1"
    return "" if summary.manifest.pipeline.time_cond_proj_dim is None else " --sampler lcm --steps 4"


def _unet_bytes(engines: dict[str, int]) -> int:
    """Of the UNet's engine, or its shards'."""
    return sum(size for name, size in engines.items() if name == "unet" or is_shard_name(name))


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
