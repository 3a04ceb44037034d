"""What the user can say about int8's calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdc.engines.errors import InputError
from sdc.engines.targets import TENSORRT_RTX, Target
from sdc.passes.precision.range_rules import MSE, RangeRule, parse_rule

DEFAULT_ALPHA = 0.5
"""Source: Xiao et al., arXiv:2211.10438, section 5: the sweet spot of most models."""


DEFAULT_METHOD = MSE
"""Measured on `tiny` (64 pictures, DDIM 20, guidance 1.9, OpenVINO): 50.4 dB of PSNR to fp32 and 11.1 thousandths of
epsilon error, against 48.5 and 12.6 of "max"; 51.5 and 10.1, against 51.0 and 10.5, with asymmetric ranges."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How activations are measured, and what follows from the measurement.

    Attributes:
        method: ranges from what was seen: "max", "percentile:99.99", "entropy" or "mse"; see `parse_rule`.
        symmetric: kind of range; None takes asymmetric ranges where the target runs them.
        alpha: of SmoothQuant; None leaves the graph as it is.
        correct_bias: whether biases make up for the mean error of rounded weights.
        prompts_file: prompts to denoise, one a line; None for the model's own.
        table_file: an earlier calibration, to be used instead of a new one.
    """

    method: str = DEFAULT_METHOD
    symmetric: bool | None = None
    alpha: float | None = DEFAULT_ALPHA
    correct_bias: bool = True
    prompts_file: Path | None = None
    table_file: Path | None = None

    def __post_init__(self) -> None:
        parse_rule(self.method)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant's alpha is {self.alpha:g}", hint="give a number from 0 to 1, or none")
        if self.table_file is not None and self.prompts_file is not None:
            raise InputError(
                "calibration prompts have no effect on a calibration that is at hand",
                hint="leave out --calibration-prompts or --calibration-table",
            )
        if self.table_file is not None and self.alpha != DEFAULT_ALPHA:
            raise InputError(
                "SmoothQuant's alpha has no effect on a calibration that is at hand: it was measured with its own",
                hint="leave out --smooth-quant or --calibration-table",
            )

    def rule_for(self, target: Target) -> RangeRule:
        """How ranges follow from what was seen, for one target.

        Raises:
            InputError: it does not run ranges of the kind that is asked for.
        """
        # Source: TensorRT documentation, "Quantization": INT8 is symmetric, zero points must be zero.
        asymmetric = target.backend != TENSORRT_RTX
        if self.symmetric is False and not asymmetric:
            raise InputError(
                f"the target {target.name!r} runs symmetric activation ranges only",
                hint="add --activations symmetric, or build the targets cpu and ort-cpu by themselves",
            )
        return parse_rule(self.method, symmetric=not asymmetric if self.symmetric is None else self.symmetric)


DEFAULT_CALIBRATION = CalibrationOptions()
