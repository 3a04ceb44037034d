"""lower-conv-to-bytes: convolutions of bytes whose results are bytes again, for ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.lower_quantised_conv import dequantize_behind, reason_against_quantised_conv, zero_point_of
from sdc.passes.matching import add_initializer, constant, is_operator, producer, replace_nodes, site, sole_consumer

_MIDDLE = 128
_FINE_STEP, _COARSEST_STEP = 2.0**-8, 0.5
"""Of sums and biases, in steps of the result."""


@dataclass(frozen=True)
class LowerConvToBytes(Pass):
    """A convolution of dequantised operands whose result is quantised per channel becomes one QLinearConv.

    Before → after, for M output channels::

        QuantizeLinear<axis = 1>(Conv(DequantizeLinear(q, s, z), DequantizeLinear(w, t), b), u, v)
            →  QLinearConv(q, s, z, w, t / u, 0, 1, 128, c),  c = round((b / u + v - 128) / (s t / u))

    QLinearConv has one scale and zero point for its whole result. It counts in steps of each channel here: the scales
    of the weights are divided by those of the result, and the zero points are part of the bias.

    Preconditions:

    1. Those of lower-quantised-conv; q's scale and zero point are constants.
    2. Only the QuantizeLinear reads the convolution's result; u are M constants, v M constants of uint8.
    3. c fits in 32 bits, and a step of it is at most half a step of the result. The scale of a channel whose weights
       are all zero says nothing; it becomes a small one.

    Not matched: what fails these.

    Why: its kernel needs no copy of what each element of the weights sees; lower-quantised-conv makes one.

    Source: ONNX operator specification, QLinearConv 10: y = saturate(round(sum (s t / y_scale)) + y_zero_point), the
    bias in steps of s t.
    """

    name: ClassVar[str] = "lower-conv-to-bytes"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Replace all sites."""
        skipped: list[Skipped] = []
        matched = 0
        for conv in list(model.graph):
            quantize = sole_consumer(conv.outputs[0]) if is_operator(conv, "Conv") else None
            if quantize is None or not is_operator(quantize, "QuantizeLinear"):
                continue
            if any(producer(value, "DequantizeLinear") is None for value in conv.inputs[:2]):
                continue
            found = _integers(conv, quantize)
            if isinstance(found, str):
                skipped.append(Skipped(site(conv), found))
                continue
            _lower(model.graph, conv, quantize, found)
            matched += 1
        return PassReport(self.name, matched, tuple(skipped))


@dataclass(frozen=True)
class _Integers:
    """What the new operator gets beside the integers of both operands."""

    scales: np.ndarray
    bias: np.ndarray


def _integers(conv: ir.Node, quantize: ir.Node) -> _Integers | str:
    """Scales and bias in steps of the result's channels, or why there are none."""
    if reason := reason_against_quantised_conv(conv):
        return reason
    activation, weight = (dequantize_behind(value) for value in conv.inputs[:2])
    step, border = constant(activation.inputs[1]), constant(zero_point_of(activation))
    if step is None or border is None:
        return "the range of the activations is found in each run"
    scales = constant(weight.inputs[1])
    assert scales is not None  # asked above
    steps, integers = constant(quantize.inputs[1]), constant(zero_point_of(quantize))
    if steps is None or integers is None or integers.dtype != np.uint8 or steps.shape != scales.shape:
        return f"the result is not quantised to uint8 with {len(scales)} constant scales"
    if quantize.attributes.get_int("axis", 1) != 1:
        return "the result is quantised along another axis than that of its channels"
    bias = np.zeros(len(scales))
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        given = constant(conv.inputs[2])
        if given is None:
            return "the bias is computed"
        bias = given.astype(np.float64)
    weights = constant(weight.inputs[0])
    assert weights is not None  # asked above
    empty = ~weights.reshape(len(weights), -1).any(axis=1)
    scales = np.where(empty, _FINE_STEP / float(step.item()), scales / steps)
    if (float(step.item()) * scales).max() > _COARSEST_STEP:
        return "the bias would be rounded to more than half a step of the result"
    wide = np.round((bias / steps + integers.astype(np.float64) - _MIDDLE) / (float(step.item()) * scales))
    if not np.abs(wide).max() <= np.iinfo(np.int32).max:
        return "the bias does not fit in 32 bits"
    return _Integers(scales.astype(np.float32), wide.astype(np.int32))


def _lower(graph: ir.Graph, conv: ir.Node, quantize: ir.Node, found: _Integers) -> None:
    activation, weight = (dequantize_behind(value) for value in conv.inputs[:2])
    name = conv.outputs[0].name

    def add(key: str, values: np.ndarray) -> ir.Value:
        return add_initializer(graph, values, f"{name}.{key}")

    operands = [
        *(activation.inputs[0], activation.inputs[1], zero_point_of(activation)),
        *(weight.inputs[0], add("scales", found.scales), add("zeros", np.zeros(len(found.scales), np.int8))),
        *(add("step", np.array(1, np.float32)), add("middle", np.array(_MIDDLE, np.uint8)), add("bias", found.bias)),
    ]
    convolve = ir.node("QLinearConv", operands, conv.attributes)
    replace_nodes([quantize, conv, activation, weight], convolve, quantize.outputs, at=quantize)
