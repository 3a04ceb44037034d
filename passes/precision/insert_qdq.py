"""insert-qdq: put short integers and floats into a graph, as QuantizeLinear and DequantizeLinear around its layers.

Symmetric quantisation: q = saturate(round(x / s)), x' = s · q, with zero point 0 and, for a range r and b bits,
s = r / (2^(b-1) - 1). For x' · w' = s_x · s_w · (q_x · q_w) a backend computes the bracket in integers.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, equations 1-4 with Z = 0; ONNX operator specification, QuantizeLinear and DequantizeLinear 23.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from sdc.engines.errors import InputError, PassError
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.matching import site
from sdc.passes.precision.activation_qdq import ActivationPairs
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.correct_bias import EXACT_WEIGHT
from sdc.passes.precision.formats import CALIBRATED, FLOATING, WEIGHTS_ONLY, Format
from sdc.passes.precision.fp8_qdq import Fp8Pairs
from sdc.passes.precision.plan import PrecisionPlan, uniform_plan
from sdc.passes.precision.quantisation import Kind, Layer, find_layers
from sdc.passes.precision.range_rules import DEFAULT_RULE, RangeRule
from sdc.passes.precision.result_qdq import quantise_result
from sdc.passes.precision.weight_qdq import StoredWeights

_MARK = "sdc.quantised_from"
"""Metadata key: digest of the calibrated graph that a quantised one came from."""


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Quantise the layers of a plan.

    Before → after, for Conv, MatMul and Gemm::

        int8, fp8:  Conv(x, w, b)  →  Conv(DequantizeLinear(QuantizeLinear(x, s_x)), DequantizeLinear(q, s_w), b)
        w8:         Conv(x, w, b)  →  Conv(x, DequantizeLinear(q, s_w), b)
        w4:         Conv(x, w, b)  →  Conv(x, Reshape(DequantizeLinear(q, s_w, block_size)), b)

    1. The layer's weight is a floating-point constant; a Conv has one group; a MatMul's weight is a matrix.
    2. The plan gives it one of these formats.
    3. Neither operand is dequantised already.
    4. For "w4", the block size divides the weights of an output channel.

    Activations have one static scale per tensor, from the table; weights one per output channel, or per block. A tensor
    that several layers read gets one pair; other readers keep the original. Biases stay in floating point. Scales are
    float16 values, so that a later cast to float16 changes nothing in the integers. With a rule of `results` there is a
    pair behind each "int8" convolution as well, with a scale for each channel. A graph that this table or plan has
    quantised before is left as it is.

    Attributes:
        table: ranges of the graph's activations; another graph is refused. None if no layer is "int8" or "fp8".
        plan: of this graph's layers; None for that of "int8" (`uniform_plan`).
        per_channel: one weight scale per output channel, or one for the whole weight.
        rule: how activations' ranges follow from the table, and how many bits the weights of "int8" and "w8" have.
    """

    name: ClassVar[str] = "insert-qdq"

    table: CalibrationTable | None
    plan: PrecisionPlan | None = None
    per_channel: bool = True
    rule: RangeRule = DEFAULT_RULE

    def rewrite(self, model: ir.Model) -> PassReport:
        """Insert the pairs.

        Raises:
            InputError: the plan names other layers than the graph has, or needs ranges and there is no table.
            PassError: the table is another graph's, a range is missing, a weight or a range is not finite, or not one
                layer is quantised.
        """
        mark = self._mark()
        if mark is not None and model.metadata_props.get(_MARK) == mark:
            return PassReport(self.name, 0, (Skipped("graph", "quantised like this before"),))
        if self.table is not None:
            self.table.check_graph(model)
        layers, skipped = find_layers(model)
        plan = self.plan or uniform_plan(model, Format.INT8)
        formats = _formats_of(layers, plan)
        skipped += _kept(layers, plan)
        if not set(formats) - FLOATING:
            raise PassError(
                f"no layer was quantised, {len(skipped)} stay as they are: {_most_frequent(skipped)}",
                hint="plan an integer format for some layers, or choose a floating-point precision",
            )
        details = self._quantise(model.graph, list(zip(layers, formats, strict=True)), plan.block_size)
        model.metadata_props[_MARK] = mark or plan.graph_digest
        matched = sum(each in CALIBRATED for each in formats)
        return PassReport(self.name, matched or details["weights_only"], tuple(skipped), details=details)

    def _mark(self) -> str | None:
        if self.table is not None:
            return self.table.graph_digest
        return None if self.plan is None else self.plan.graph_digest

    def _quantise(self, graph: ir.Graph, layers: list[tuple[Layer, Format]], block_size: int) -> dict[str, Any]:
        weights = StoredWeights(graph, bits=self.rule.weight_bits, per_channel=self.per_channel, block_size=block_size)
        pairs = self._pairs(graph, {wanted for _, wanted in layers})
        channels = {
            layer.node: layer.weight_shape[layer.output_axis]
            for layer, wanted in layers
            if wanted == Format.INT8 and self._may_write_bytes(layer)
        }
        for layer, wanted in layers:
            activation = pairs[wanted].dequantised(layer.activation, _dtype(layer)) if wanted in pairs else None
            if wanted not in FLOATING:
                layer.node.meta[EXACT_WEIGHT] = layer.weight.const_value
                layer.node.replace_input_with(1, weights.dequantised(layer, wanted))
            if activation is not None:
                layer.node.replace_input_with(0, activation)
        weights.remove_unused()
        written = self._quantise_results(graph, channels)
        return {
            "weights_only": sum(wanted in WEIGHTS_ONLY for _, wanted in layers),
            "activations": sum(map(len, pairs.values())),
            "results": written,
            "results_without_range": len(channels) - written if self.rule.results else 0,
            "ranges": self.rule.label,
            "formats": dict(sorted(Counter(wanted.value for _, wanted in layers).items())),
            **weights.details(),
        }

    def _may_write_bytes(self, layer: Layer) -> bool:
        """Whether a backend can compute bytes from bytes by this layer: a plain convolution of images in float32."""
        attributes = layer.node.attributes
        return (
            layer.node.op_type == Kind.CONV
            and layer.spatial_axes == 2
            and self.per_channel
            and all(step == 1 for step in attributes.get_ints("dilations", ()))
            and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
            and _dtype(layer) == ir.DataType.FLOAT
        )

    def _quantise_results(self, graph: ir.Graph, channels: dict[ir.Node, int]) -> int:
        """Pairs around what convolutions write, where that is asked for and the table knows it; how many there are.

        Args:
            graph: gets the pairs.
            channels: number of each convolution's output channels.
        """
        if self.table is None or not self.rule.results:
            return 0
        count = 0
        for conv, number in channels.items():
            result = conv.outputs[0]
            ranges = self.table.results.get(result.name or "")
            # A result that a layer reads as it is has its one pair already, and is not in the table's results.
            if ranges is not None and not result.is_graph_output():
                quantise_result(graph, conv, ranges, channels=number, symmetric=self.rule.symmetric)
                count += 1
        return count

    def _pairs(self, graph: ir.Graph, formats: set[Format]) -> dict[Format, ActivationPairs | Fp8Pairs]:
        """What quantises activations, by format."""
        wanted = formats & CALIBRATED
        if wanted and self.table is None:
            raise InputError(
                f"{' and '.join(sorted(wanted))} layers without a calibration table", hint="calibrate first"
            )
        pairs: dict[Format, ActivationPairs | Fp8Pairs] = {}
        if self.table is not None and Format.INT8 in wanted:
            pairs[Format.INT8] = ActivationPairs(graph, self.table, self.rule)
        if self.table is not None and Format.FP8 in wanted:
            pairs[Format.FP8] = Fp8Pairs(graph, self.table)
        return pairs


def _formats_of(layers: list[Layer], plan: PrecisionPlan) -> list[Format]:
    planned = plan.by_name()
    names = [layer.node.outputs[0].name or "" for layer in layers]
    unknown, unplanned = sorted(set(planned) - set(names)), sorted(set(names) - set(planned))
    if unknown or unplanned:
        found = f"has no line for {_count(unplanned)}" if unplanned else ""
        named = f"names {_count(unknown)} that the graph does not have" if unknown else ""
        raise InputError(
            f"the precision plan {' and '.join(filter(None, (found, named)))}",
            hint="start from the plan in a bundle of this model, and change nothing but precisions",
        )
    return [planned[name].format for name in names]


def _count(names: list[str]) -> str:
    return f"the layer {names[0]!r}" if len(names) == 1 else f"{len(names)} layers ({names[0]!r} ...)"


def _kept(layers: list[Layer], plan: PrecisionPlan) -> list[Skipped]:
    planned = plan.by_name()
    found = [(layer, planned[layer.node.outputs[0].name or ""]) for layer in layers]
    return [Skipped(site(layer.node), line.reason) for layer, line in found if line.format in FLOATING]


def _dtype(layer: Layer) -> ir.DataType:
    """The element type that the layer computes in, and so that of its scales."""
    tensor = ir.convenience.get_const_tensor(layer.weight)
    assert tensor is not None  # `find_layers` selects constant weights only
    return tensor.dtype


def _most_frequent(kept: list[Skipped]) -> str:
    counts = Counter(each.reason for each in kept)
    return (
        "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "it has no Conv, MatMul or Gemm"
    )
