"""What the user can say about int8's calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdc.engines.errors import InputError
from sdc.engines.targets import TENSORRT_RTX, Target
from sdc.passes.precision.range_rules import DEFAULT_RULE, RangeRule

DEFAULT_ALPHA = 0.5
"""Source: Xiao et al., arXiv:2211.10438, section 5: the sweet spot of most models."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How activations are measured, and what follows from the measurement.

    Attributes:
        rule: ranges from what was seen.
        alpha: of SmoothQuant; None leaves the graph as it is.
        correct_bias: whether biases make up for the mean error of rounded weights.
        prompts_file: prompts to denoise, one a line; None for the model's own.
        table_file: an earlier calibration, to be used instead of a new one.
    """

    rule: RangeRule = DEFAULT_RULE
    alpha: float | None = DEFAULT_ALPHA
    correct_bias: bool = True
    prompts_file: Path | None = None
    table_file: Path | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant's alpha is {self.alpha:g}", hint="give a number from 0 to 1, or none")
        if self.prompts_file is not None and self.table_file is not None:
            raise InputError(
                "calibration prompts have no effect on a calibration that is at hand",
                hint="leave out --calibration-prompts or --calibration-table",
            )

    def check_target(self, target: Target) -> None:
        """Pass only if the target runs ranges of this kind.

        Raises:
            InputError: it runs symmetric ranges only.
        """
        # Source: TensorRT documentation, "Quantization": INT8 is symmetric, zero points must be zero.
        if not self.rule.symmetric and target.backend == TENSORRT_RTX:
            raise InputError(
                f"the target {target.name!r} runs symmetric activation ranges only",
                hint="add --activations symmetric, or build the targets cpu and ort-cpu by themselves",
            )


DEFAULT_CALIBRATION = CalibrationOptions()
