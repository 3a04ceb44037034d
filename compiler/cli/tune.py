"""`sdc tune`: the fastest way to draw within a budget, with one bundle or several, as the preset of a copy."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdc.compiler.cli.pictures import add_picture_arguments, settings_from_arguments

SUMMARY = "measure ways to draw faster, and write the best into a copy of a bundle"

SAMPLES, SAMPLES_OF_OTHER_MODELS = 1000, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE",
        help="a bundle, or several of one model, of which the fastest is copied; they stay as they are",
    )  # fmt: skip
    parser.add_argument(
        "--budget", required=True, metavar="M=N",
        help="what pictures may lose against the reference's: fd=+1.0 (Fréchet distance to real pictures, tiny only), "
        "or psnr=30 (least PSNR, dB)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="COPY", help="the copy; nothing may be there")
    parser.add_argument(
        "--reference", type=Path, metavar="BUNDLE", help="what pictures and times are compared with (the first)"
    )
    add_picture_arguments(parser)
    parser.add_argument("--samples", type=int, help=f"pictures ({SAMPLES} for tiny, {SAMPLES_OF_OTHER_MODELS} else)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (0)")
    parser.add_argument("--rounds", type=int, default=5, help="timed pictures of each way (5)")
    parser.add_argument("--target", help="which engines to run (the fastest that run here)")
    parser.add_argument("--batch", type=int, help="pictures at once (as many as the engines take)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all measurements as JSON; the copy has them too"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page: quality against time")


def run(args: argparse.Namespace) -> int:
    """Tune; the table goes to standard output, progress to standard error."""
    from sdc.compiler.cli.progress import show_progress
    from sdc.compiler.evaluate.settings import JUDGED_MODEL
    from sdc.compiler.plain_json import check_writable, write_json
    from sdc.compiler.tune.budget import parse_budget
    from sdc.compiler.tune.report import format_tuning
    from sdc.compiler.tune.tune import TuneRequest, tune
    from sdc.engines.bundle import open_bundle
    from sdc.engines.errors import InputError

    budget = parse_budget(args.budget)
    check_writable(args.json, args.report)
    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, found {args.rounds}")
    judged = open_bundle(args.bundles[0]).manifest.model.name == JUDGED_MODEL
    samples = args.samples if args.samples is not None else SAMPLES if judged else SAMPLES_OF_OTHER_MODELS
    settings = settings_from_arguments(args, samples=samples, batch=args.batch)
    request = TuneRequest(tuple(args.bundles), args.out, budget, settings, args.reference, args.rounds)
    with show_progress() as progress:
        tuning = tune(request, progress=progress)
    write_json(args.json, tuning.to_json())
    if args.report is not None:
        from sdc.compiler.compare.html_parts import write_page
        from sdc.compiler.tune.page import tuning_page

        write_page(args.report, tuning_page(tuning))
    print(format_tuning(tuning))
    return 0
