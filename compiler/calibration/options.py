"""What the user can say about int8's calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sdc.engines.errors import InputError
from sdc.engines.processor import MOST_WEIGHT_BITS, multiplies_bytes_exactly
from sdc.engines.targets import ONNXRUNTIME, OPENVINO, TENSORRT_RTX, Target
from sdc.passes.precision.range_rules import DYNAMIC, LP, RangeRule, parse_rule
from sdc.passes.precision.smoothing_rule import DEFAULT_SMOOTHING, SmoothingRule

DEFAULT_METHOD = LP
"""Measured on `tiny`: docs/results/int8.md, calibrators."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How activations are measured, and what follows from the measurement.

    Attributes:
        method: ranges from what was seen: "max", "percentile:99.99", "entropy", "mse" or "lp:2.4", or "dynamic"; see
            `parse_rule`.
        symmetric: kind of range; None takes asymmetric ranges where the target runs them.
        smoothing: of SmoothQuant; None leaves the graph as it is.
        correct_bias: whether biases make up for the mean error of rounded weights.
        reduce_range: whether weights for CPUs have 7 bits, for x86 processors without VNNI; None if this one has none.
        prompts_file: prompts to denoise, one a line; None for the model's own.
        steps: of each picture; None for what suits the network's size.
        size_px: height and width of the pictures; likewise.
        timesteps: how many of the steps are kept, chosen by what ranges they cover; None for all.
        table_file: an earlier calibration, to be used instead of a new one.
    """

    method: str = DEFAULT_METHOD
    symmetric: bool | None = None
    smoothing: SmoothingRule | None = DEFAULT_SMOOTHING
    correct_bias: bool = True
    reduce_range: bool | None = None
    prompts_file: Path | None = None
    steps: int | None = None
    size_px: int | None = None
    timesteps: int | None = None
    table_file: Path | None = None

    def __post_init__(self) -> None:
        parse_rule(self.method, symmetric=bool(self.symmetric))
        drawing = {
            "prompts": self.prompts_file,
            "steps": self.steps,
            "size": self.size_px,
            "timesteps": self.timesteps,
        }
        for name, value in drawing.items():
            if self.table_file is not None and value is not None:
                raise InputError(
                    f"--calibration-{name} has no effect on a calibration that is at hand",
                    hint=f"leave out --calibration-{name} or --calibration-table",
                )
            if isinstance(value, int) and value < 1:
                raise InputError(f"--calibration-{name} is {value}", hint="give a positive number")
        if self.timesteps is not None and self.steps is not None and self.timesteps > self.steps:
            raise InputError(
                f"--calibration-timesteps asks for {self.timesteps} of {self.steps} steps",
                hint="ask for fewer, or give more --calibration-steps",
            )
        if self.table_file is not None and self.smoothing != DEFAULT_SMOOTHING:
            raise InputError(
                "--smooth-quant has no effect on a calibration that is at hand: it was measured with its own",
                hint="leave out --smooth-quant or --calibration-table",
            )

    @property
    def reduces_range(self) -> bool:
        """Whether weights for CPUs have 7 bits; this processor decides where the user does not."""
        return not multiplies_bytes_exactly() if self.reduce_range is None else self.reduce_range

    def rule_for(self, target: Target) -> RangeRule:
        """How ranges follow from what was seen, for one target.

        Raises:
            InputError: it does not run ranges of the kind that is asked for.
        """
        dynamic = parse_rule(self.method, symmetric=False).method == DYNAMIC
        if dynamic and target.backend != ONNXRUNTIME:
            raise InputError(
                f"the target {target.name!r} runs no dynamic ranges",
                hint="add --target ort-cpu, or another --calibration",
            )
        # Source: TensorRT documentation, "Quantization": INT8 is symmetric, zero points must be zero.
        asymmetric = target.backend != TENSORRT_RTX
        if self.symmetric is False and not asymmetric:
            raise InputError(
                f"the target {target.name!r} runs symmetric activation ranges only",
                hint="add --activations symmetric, or build the targets cpu and ort-cpu by themselves",
            )
        rule = parse_rule(self.method, symmetric=not asymmetric if self.symmetric is None else self.symmetric)
        # Its convolutions of bytes are fast where they write bytes; others take what a convolution writes as it is.
        return replace(
            rule,
            results=target.backend == ONNXRUNTIME and not dynamic,
            weight_bits=self._weight_bits(target),
        )

    def _weight_bits(self, target: Target) -> int:
        if target.backend not in (OPENVINO, ONNXRUNTIME):
            return MOST_WEIGHT_BITS
        return MOST_WEIGHT_BITS - self.reduces_range


DEFAULT_CALIBRATION = CalibrationOptions()
