"""insert-qdq: put integer arithmetic into a graph, as QuantizeLinear and DequantizeLinear around its layers.

Symmetric quantisation: q = saturate(round(x / s)), x' = s · q, with zero point 0 and, for a range r and b bits,
s = r / (2^(b-1) - 1). For x' · w' = s_x · s_w · (q_x · q_w) a backend computes the bracket in integers.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, equations 1-4 with Z = 0; ONNX operator specification, QuantizeLinear and DequantizeLinear 23.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.precision.activation_qdq import ActivationPairs
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.quantisation import DEFAULT_KEPT, DEFAULT_WEIGHTS_ONLY, Layer, select_layers
from sdc.passes.precision.weight_qdq import StoredWeights

_MARK = "sdc.quantised_from"
"""Metadata key: digest of the calibrated graph that a quantised one came from."""


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Quantise the layers that the policy selects.

    Before → after, for Conv, MatMul and Gemm::

        y = Conv(x, w, b)  →  y = Conv(DequantizeLinear(QuantizeLinear(x, s_x)), DequantizeLinear(w_int8, s_w), b)

    1. The layer's weight is a floating-point constant; a Conv has one group; a MatMul's weight is a matrix.
    2. Its role (`Role`) is not in `kept`.
    3. Neither operand is dequantised already.

    Where the role is in `kept` and in `weights_only`, only the weight is quantised: the layer computes in floating
    point and reads fewer bytes.

    Activations have one static scale per tensor, from the table; weights one per output channel, stored as int8.
    A tensor that several layers read gets one pair; other readers keep the original. Biases stay in floating point.
    Scales are rounded up to float16 values, so that a later cast to float16 changes nothing in the integers. A graph
    that this table has quantised before is left as it is.

    Attributes:
        table: ranges of the graph's activations; another graph is refused.
        kept: roles whose arithmetic stays in floating point.
        weights_only: roles among them whose weights are stored as integers.
        weight_bits: 2 to 8; below 8 the integers are limited to the smaller range, in int8 storage. 4 with
            `per_channel` off is the known-bad control of evaluations.
        per_channel: one weight scale per output channel, or one for the whole weight.
    """

    name: ClassVar[str] = "insert-qdq"

    table: CalibrationTable
    kept: frozenset[Role] = DEFAULT_KEPT
    weights_only: frozenset[Role] = DEFAULT_WEIGHTS_ONLY
    weight_bits: int = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise InputError(f"weights of {self.weight_bits} bits", hint="ask for 2 to 8 bits")

    def rewrite(self, model: ir.Model) -> PassReport:
        """Insert the pairs.

        Raises:
            PassError: the table is another graph's, a range is missing, a weight or a range is not finite, or not one
                layer is quantised.
        """
        if model.metadata_props.get(_MARK) == self.table.graph_digest:
            return PassReport(self.name, 0, (Skipped("graph", "quantised with this table before"),))
        self.table.check_graph(model)
        selection = select_layers(model, self.kept, self.weights_only)
        if not selection.quantised:
            raise PassError(
                f"no layer was quantised, {len(selection.kept)} stay as they are: {_most_frequent(selection.kept)}",
                hint="keep fewer roles in floating point, or choose another precision",
            )
        activations = ActivationPairs(model.graph, self.table)
        weights = StoredWeights(model.graph, bits=self.weight_bits, per_channel=self.per_channel)
        for layer in selection.quantised:
            activation = activations.dequantised(layer.activation, _dtype(layer))
            layer.node.replace_input_with(1, weights.dequantised(layer))
            layer.node.replace_input_with(0, activation)
        for layer in selection.weights_only:
            layer.node.replace_input_with(1, weights.dequantised(layer))
        weights.remove_unused()
        model.metadata_props[_MARK] = self.table.graph_digest
        details = {"weights_only": len(selection.weights_only), "activations": len(activations), **weights.details()}
        return PassReport(self.name, len(selection.quantised), selection.kept, details=details)


def _dtype(layer: Layer) -> ir.DataType:
    """The element type that the layer computes in, and so that of its scales."""
    tensor = ir.convenience.get_const_tensor(layer.weight)
    assert tensor is not None  # `find_layers` selects constant weights only
    return tensor.dtype


def _most_frequent(kept: tuple[Skipped, ...]) -> str:
    counts = Counter(each.reason for each in kept)
    return (
        "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "it has no Conv, MatMul or Gemm"
    )
