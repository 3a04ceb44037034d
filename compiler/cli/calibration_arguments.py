"""Arguments of commands that calibrate int8."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdc.engines.errors import InputError

if TYPE_CHECKING:
    from sdc.compiler.calibration.options import CalibrationOptions


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; all are for int8."""
    group = parser.add_argument_group("calibration of int8")
    group.add_argument(
        "--calibration",
        metavar="METHOD",
        help="ranges of activations: max, percentile[:99.99], entropy, or mse (mse)",
    )
    group.add_argument(
        "--activations",
        choices=("symmetric", "asymmetric"),
        help="kind of range; asymmetric runs on CPUs only (asymmetric where it runs)",
    )
    group.add_argument("--smooth-quant", metavar="ALPHA|none", help="move outliers from activations to weights")
    group.add_argument("--no-bias-correction", action="store_true", help="leave the mean error of rounded weights in")
    group.add_argument(
        "--calibration-prompts", type=Path, metavar="FILE", help="prompts to denoise, one a line (the model's own)"
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

    default = DEFAULT_CALIBRATION
    return CalibrationOptions(
        method=args.calibration or default.method,
        symmetric=None if args.activations is None else args.activations == "symmetric",
        alpha=default.alpha if args.smooth_quant is None else _alpha(args.smooth_quant),
        correct_bias=default.correct_bias and not args.no_bias_correction,
        prompts_file=args.calibration_prompts,
        table_file=args.calibration_table,
    )


def _alpha(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--smooth-quant {text!r} is no number", hint="give a number from 0 to 1, or none") from error
