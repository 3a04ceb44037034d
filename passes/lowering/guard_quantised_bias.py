"""guard-quantised-bias: no quantised convolution without a bias, for OpenVINO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.matching import producer

_SMALLEST = {ir.DataType.FLOAT: np.finfo(np.float32).tiny, ir.DataType.FLOAT16: np.finfo(np.float16).smallest_subnormal}
"""The smallest bias that is not flushed to zero: float32 as a normal number, float16 as it is widened on the way."""


@dataclass(frozen=True)
class GuardQuantisedBias(Pass):
    """Quantised convolutions have a bias that is not all zeros; what they compute changes by at most 2^-24.

    Before → after::

        Conv(DequantizeLinear(x), DequantizeLinear(w))         →  Conv(..., ..., smallest positive number)
        Conv(DequantizeLinear(x), DequantizeLinear(w), zeros)  →  the same

    1. Both operands are dequantised, in float32 or float16.
    2. There is no bias, or a constant one of zeros. Any other bias is left alone.

    Why: OpenVINO (2026.4, CPU) applies the scales of such a convolution twice if its result is read more than once and
    one reader is a residual sum that it fuses into another convolution; its values come out a factor of s_x * s_w too
    small. With a bias they are right; one of zeros it optimises away first.
    """

    name: ClassVar[str] = "guard-quantised-bias"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Add the biases; convolutions of equal width share one."""
        shared: dict[tuple[ir.DataType, int], ir.Value] = {}
        matched = 0
        for node in model.graph:
            if node.domain or node.op_type != "Conv" or not _needs_bias(node):
                continue
            scale = _dequantising_scale(node)
            assert scale.dtype is not None  # `_needs_bias` has asked
            weight = node.inputs[1]
            assert weight is not None
            assert weight.shape is not None
            key = (scale.dtype, weight.shape.numpy()[0])
            if key not in shared:
                shared[key] = _add_bias(model.graph, *key)
            node.resize_inputs(3)
            node.replace_input_with(2, shared[key])
            matched += 1
        return PassReport(self.name, matched)


def _needs_bias(node: ir.Node) -> bool:
    if any(producer(value, "DequantizeLinear") is None for value in node.inputs[:2]):
        return False
    if _dequantising_scale(node).dtype not in _SMALLEST:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    tensor = ir.convenience.get_const_tensor(bias)
    return tensor is not None and not tensor.numpy().any()


def _dequantising_scale(node: ir.Node) -> ir.Value:
    weight = producer(node.inputs[1], "DequantizeLinear")
    assert weight is not None
    scale = weight.inputs[1]
    assert scale is not None  # required by the operator
    return scale


def _add_bias(graph: ir.Graph, dtype: ir.DataType, width: int) -> ir.Value:
    name = f"sdc.guarding_bias.{dtype.name.lower()}.{width}"
    tensor = ir.tensor(np.full(width, _SMALLEST[dtype], dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=ir.Shape([width]), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
