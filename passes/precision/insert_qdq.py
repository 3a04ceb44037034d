"""insert-qdq: put integer arithmetic into a graph, as QuantizeLinear and DequantizeLinear around its layers.

Symmetric quantisation: q = saturate(round(x / s)), x' = s · q, with zero point 0 and, for a range r and b bits,
s = r / (2^(b-1) - 1). For x' · w' = s_x · s_w · (q_x · q_w) a backend computes the bracket in integers.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, equations 1-4 with Z = 0; ONNX operator specification, QuantizeLinear and DequantizeLinear 23.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import site
from sdc.passes.precision.activation_qdq import ActivationPairs
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.correct_bias import EXACT_WEIGHT
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.quantisation import DEFAULT_KEPT, DEFAULT_WEIGHTS_ONLY, Layer, select_layers
from sdc.passes.precision.range_rules import DEFAULT_RULE, RangeRule
from sdc.passes.precision.scales import scale_from_range

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
        rule: how activations' ranges follow from the table.
    """

    name: ClassVar[str] = "insert-qdq"

    table: CalibrationTable
    kept: frozenset[Role] = DEFAULT_KEPT
    weights_only: frozenset[Role] = DEFAULT_WEIGHTS_ONLY
    weight_bits: int = 8
    per_channel: bool = True
    rule: RangeRule = DEFAULT_RULE

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
        rewriter = _Rewriter(model.graph, self, ActivationPairs(model.graph, self.table, self.rule))
        for layer in selection.quantised:
            rewriter.quantise(layer)
        for layer in selection.weights_only:
            rewriter.quantise_weight(layer)
        rewriter.remove_unused_weights()
        model.metadata_props[_MARK] = self.table.graph_digest
        details = {"weights_only": len(selection.weights_only), **rewriter.details()}
        return PassReport(self.name, len(selection.quantised), selection.kept, details=details)


@dataclass
class _Rewriter:
    """What one application of the pass has inserted so far."""

    graph: ir.Graph
    options: InsertQdq
    activations: ActivationPairs
    weights: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def quantise(self, layer: Layer) -> None:
        """Put the layer's two operands behind Q/DQ."""
        activation = self.activations.dequantised(layer.activation, _dtype(layer))
        self.quantise_weight(layer)
        layer.node.replace_input_with(0, activation)

    def quantise_weight(self, layer: Layer) -> None:
        """Put the layer's weight behind DQ."""
        key = (layer.weight, layer.output_axis)
        if key not in self.weights:
            self.weights[key] = self._quantised_weight(layer)
        layer.node.meta[EXACT_WEIGHT] = layer.weight.const_value
        layer.node.replace_input_with(1, self.weights[key])

    def remove_unused_weights(self) -> None:
        """Drop the floating-point weights that nothing reads any more."""
        for weight, _ in self.weights:
            name = weight.name or ""
            if not weight.uses() and name in self.graph.initializers and not weight.is_graph_output():
                del self.graph.initializers[name]

    def details(self) -> dict[str, Any]:
        """Figures for the report."""
        return {
            "activations": len(self.activations),
            "ranges": self.options.rule.label,
            "weights": len(self.weights),
            "weight_bytes_before": self.bytes_before,
            "weight_bytes_after": self.bytes_after,
            "weight_bits": self.options.weight_bits,
            "per_channel": self.options.per_channel,
        }

    def _quantised_weight(self, layer: Layer) -> ir.Value:
        value, axis = layer.weight, layer.output_axis
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None  # `find_layers` selects constant weights only
        levels = 2 ** (self.options.weight_bits - 1) - 1
        weights = tensor.numpy().astype(np.float32)
        if not np.isfinite(weights).all():
            raise PassError(f"the weight of {site(layer.node)} holds NaN or infinity", hint="check the checkpoint")
        integers, scale = quantise_weights(weights, levels=levels, axis=axis if self.options.per_channel else None)
        stored = self._initializer(f"{value.name}.int8", integers)
        scales = self._initializer(f"{value.name}.qdq_scale", scale.astype(_dtype(layer).numpy()))
        node = ir.node("DequantizeLinear", [stored, scales], {"axis": axis} if self.options.per_channel else {})
        node.outputs[0].name = f"{stored.name}.dequantised"
        node.outputs[0].shape = ir.Shape(weights.shape)
        node.outputs[0].dtype = _dtype(layer)
        self.graph.insert_before(layer.node, node)
        self.bytes_before += tensor.nbytes
        self.bytes_after += integers.nbytes + scale.nbytes
        return node.outputs[0]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        taken = self.graph.initializers
        name = next(each for each in chain([name], (f"{name}.{i}" for i in count(2))) if each not in taken)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _dtype(layer: Layer) -> ir.DataType:
    """The element type that the layer computes in, and so that of its scales."""
    tensor = ir.convenience.get_const_tensor(layer.weight)
    assert tensor is not None  # `find_layers` selects constant weights only
    return tensor.dtype


def quantise_weights(weights: np.ndarray, *, levels: int, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers of a weight.

    Args:
        weights: any shape, finite.
        levels: the largest integer.
        axis: one scale for each index along it; a single scale if None.

    Returns:
        The integers (int8, the weight's shape, within ±levels) and the scales (float32, [weights.shape[axis]] or []).
    """
    others = None if axis is None else tuple(i for i in range(weights.ndim) if i != axis)
    limits = np.abs(weights).max(axis=others)
    scale = scale_from_range(limits, levels)
    spread = scale if axis is None else np.expand_dims(scale, others or ())
    return np.rint(weights / spread).astype(np.int8), scale


def _most_frequent(kept: tuple[Skipped, ...]) -> str:
    counts = Counter(each.reason for each in kept)
    return (
        "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "it has no Conv, MatMul or Gemm"
    )
