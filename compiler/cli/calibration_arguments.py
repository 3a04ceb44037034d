"""Arguments of commands that calibrate int8."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdc.compiler.calibration.options import CalibrationOptions


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; all are for int8."""
    group = parser.add_argument_group("calibration of int8")
    group.add_argument(
        "--calibration",
        metavar="METHOD",
        help="ranges of activations: max, percentile[:99.99], entropy, mse, lp[:2.4], or dynamic: of each run, "
        "on ort-cpu (lp)",
    )
    group.add_argument(
        "--activations",
        choices=("symmetric", "asymmetric"),
        help="kind of range; asymmetric runs on CPUs only (asymmetric where it runs)",
    )
    group.add_argument(
        "--smooth-quant",
        metavar="ALPHA[:RATIO]|none",
        help="move outliers from activations to weights: channels whose factor is RATIO times the median's (0.5:4)",
    )
    group.add_argument("--no-bias-correction", action="store_true", help="leave the mean error of rounded weights in")
    group.add_argument(
        "--reduce-range",
        action=argparse.BooleanOptionalAction,
        help="weights of 7 bits on cpu and ort-cpu, for x86 processors without VNNI, whose products of 8 bits saturate "
        "(if this is one)",
    )
    group.add_argument(
        "--calibration-prompts", type=Path, metavar="FILE", help="prompts to denoise, one a line (the model's own)"
    )
    group.add_argument(
        "--calibration-steps", type=int, metavar="N", help="of each picture (20; 10 for networks like SD 1.5's)"
    )
    group.add_argument(
        "--calibration-size",
        type=int,
        metavar="PX",
        help="height and width of the pictures (the model's own; half of it, 256 at most, for networks like SD 1.5's)",
    )
    group.add_argument(
        "--calibration-timesteps",
        type=int,
        metavar="N",
        help="draw in N of these steps: the noisiest and those that cover most of the first pictures' ranges (all)",
    )
    group.add_argument(
        "--calibration-table", type=Path, metavar="FILE", help="use the calibration/unet.json of an earlier export"
    )


def calibration_options(args: argparse.Namespace) -> CalibrationOptions:
    """Read the arguments.

    Raises:
        InputError: an argument makes no sense, alone or with the others.
    """
    from sdc.compiler.calibration.options import DEFAULT_CALIBRATION, CalibrationOptions
    from sdc.passes.precision.smoothing_rule import parse_smoothing

    default = DEFAULT_CALIBRATION
    return CalibrationOptions(
        method=args.calibration or default.method,
        symmetric=None if args.activations is None else args.activations == "symmetric",
        smoothing=default.smoothing if args.smooth_quant is None else parse_smoothing(args.smooth_quant),
        correct_bias=default.correct_bias and not args.no_bias_correction,
        reduce_range=args.reduce_range,
        prompts_file=args.calibration_prompts,
        steps=args.calibration_steps,
        size_px=args.calibration_size,
        timesteps=args.calibration_timesteps,
        table_file=args.calibration_table,
    )
