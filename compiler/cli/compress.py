"""`sdc compress`: a checkpoint with a smaller UNet, that an export takes like any other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdc.compiler.cli import compress_restore
from sdc.compiler.cli.training_arguments import (
    add_training_arguments,
    grid_prompts,
    open_pictures,
    set_threads,
    with_arguments,
)
from sdc.engines.errors import InputError

DEFAULT_ELASTIC = 0.05

SUMMARY = "make a model's UNet smaller: remove channels or weights, and let it recover from the model as it was"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    restore = parser.add_subparsers(metavar="[restore]").add_parser(
        "restore", help=compress_restore.SUMMARY, description=compress_restore.SUMMARY
    )
    compress_restore.add_arguments(restore)
    restore.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show logs, and tracebacks")
    restore.set_defaults(run_restore=compress_restore.run)
    parser.add_argument("--model", help='"tiny", "sd15", an id on the hub, a diffusers folder or a file')
    parser.add_argument(
        "--weights", choices=("trained", "random"), default="trained", help="random: the architecture, no download"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the smaller model and its report")
    parser.add_argument(
        "--parameters",
        type=float,
        metavar="SHARE",
        help="of the UNet's that shall go, those of removed blocks among them (0.41; 0 with --student, --sparsity or "
        "--low-rank)",
    )
    parser.add_argument(
        "--importance",
        choices=("fisher", "taylor", "magnitude"),
        help="of a channel: by second or first order of the error, or by its weights (fisher)",
    )
    parser.add_argument(
        "--budgets",
        choices=("sensitivity", "uniform"),
        help="widths of layers by their measured error, or one share for all (sensitivity)",
    )
    parser.add_argument(
        "--student",
        choices=("same", "base", "small"),
        help="remove blocks, as BK-SDM does: one of two pairs in each stage, and the middle too (same: none)",
    )
    parser.add_argument("--multiple", type=int, help="of channels that are kept: 1, 8, 16 or 32 (8)")
    parser.add_argument(
        "--sparsity",
        metavar="2:4|SHARE",
        help="weights that become zero at the end: two of every four along a layer's inputs, which GPUs with sparse "
        "tensor cores skip, or that share of each layer, which makes nothing faster",
    )
    parser.add_argument(
        "--sparsity-scores",
        choices=("activation", "magnitude"),
        help="which become zero: by weight times the norm of its input, or by weight (activation)",
    )
    parser.add_argument(
        "--low-rank",
        metavar="ENERGY|BUDGET",
        help="layers get the least rank that keeps this share of their energy, for example 0.99, where it saves work; "
        "or, for example, 1dB: of six shares the smallest with which the prediction's SNR on held-out pictures is at "
        "most that much below what it is just before",
    )
    parser.add_argument(
        "--low-rank-by",
        choices=("activation", "plain"),
        help="whose energy: what layers give, or their weights' own (activation)",
    )
    parser.add_argument(
        "--elastic",
        type=float,
        nargs="?",
        const=DEFAULT_ELASTIC,
        metavar="SHARE",
        help="of channels in layers that lose some: as many of those that stay are switched off, and `sdc compress "
        f"restore` can switch them on in a bundle ({DEFAULT_ELASTIC} if no share is given; without the option, none)",
    )
    parser.add_argument("--rounds", type=int, help="of pruning (3)")
    parser.add_argument("--round-steps", type=int, metavar="N", help="of recovery between rounds (200)")
    parser.add_argument("--recover-steps", type=int, metavar="N", help="of recovery at the end (5000; 4000 for tiny)")
    parser.add_argument("--probe-rows", type=int, metavar="N", help="latents to measure on (128; 512 for tiny)")
    parser.add_argument("--batch", type=int, help="pictures a step (16; 64 for tiny)")
    parser.add_argument("--learning-rate", type=float, help="the largest (5e-5; 1e-3 for tiny)")
    parser.add_argument(
        "--guidance", metavar="LOW:HIGH", help="range of scales at which guided predictions are compared (1:9; 1:3)"
    )
    parser.add_argument("--feature-weight", type=float, help="of the loss on what each stage gives (0.1)")
    add_training_arguments(parser, data_required=False)


def run(args: argparse.Namespace) -> int:
    """Compress; progress goes to standard error, the report to standard output."""
    if hasattr(args, "run_restore"):
        _refuse_own_options(args)
        code: int = args.run_restore(args)
        return code
    for name in ("model", "out"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing", hint="sdc compress --model MODEL --out FOLDER; see --help")
    from sdc.compiler.compress.compress import compress
    from sdc.compiler.compress.settings import settings_for
    from sdc.compiler.distill.training_loop import Reporting
    from sdc.compiler.load import load_checkpoint

    if args.out.exists():
        raise InputError(f"{args.out} is there already", hint="remove it, or name another folder with --out")
    if not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out} cannot be written", hint="name a folder in one that exists")
    others = (args.sparsity, args.low_rank, None if args.student == "same" else args.student)
    if args.parameters is None and any(each is not None for each in others):
        args.parameters = 0.0
    settings = with_arguments(settings_for(args.model), args)
    if args.data is None and settings.has_rank_budget:
        raise InputError(
            f"--low-rank {args.low_rank} is measured on pictures",
            hint="give --data, or a share of energy such as --low-rank 0.99",
        )
    set_threads(args.threads)
    checkpoint = load_checkpoint(args.model, weights=args.weights)
    pictures = None if args.data is None else open_pictures(args, checkpoint, settings.seed)
    reporting = Reporting(
        args.work or args.out.with_name(f"{args.out.name}.work"),
        [] if pictures is None else grid_prompts(args.model, pictures),
        checkpoint_every=args.checkpoint_every,
        grid_every=args.grid_every,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report = compress(checkpoint, pictures, settings, out=args.out, reporting=reporting)
    print(f"{report.to_text()}\nnext: sdc export --model {args.out}")
    return 0


def _refuse_own_options(args: argparse.Namespace) -> None:
    """What is given before the word "restore" would count for nothing."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in vars(parser.parse_args([])).items():
        if name not in compress_restore.OPTIONS and getattr(args, name) != value:
            raise InputError(
                f"--{name.replace('_', '-')} stands before `restore`, where it counts for nothing",
                hint="give it behind `restore`, or leave it out: the bundle says what it was made from",
            )
