"""Give the two halves of a gated layer a MatMul each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdc.passes import domain
from sdc.passes.base import Pass, PassReport, Skipped
from sdc.passes.lowering.weight_slices import LinearWeight, add_columns, columns_of_weight, match_linear_weight
from sdc.passes.matching import constant, dimensions, producer, site, sole_consumer


@dataclass(frozen=True)
class SplitGeGlu(Pass):
    """A gated layer is two MatMuls and no Split.

    Before → after, with w = [w1, w2], bias = [b1, b2] cut in the middle of their last axis::

        y = sdc.BiasGeGlu(MatMul(x, w), bias)
            →  y = Mul(Add(MatMul(x, w1), b1), Gelu(Add(MatMul(x, w2), b2)))

    For OpenVINO, which computes a MatMul with its bias and Gelu in one kernel but has a slow Split.
    A quantised weight stays one: the integers and their scales are cut alike. The halves are cut when they are
    written, so that the weight is not held twice.

    Preconditions:

    1. The argument is a MatMul's output that nothing else reads.
    2. Its weight is a matrix, plain or dequantised with one scale or one per output channel, and nothing else reads it.
    3. The bias is an initialiser.

    Not matched: what fails these; it is inlined with its Split.
    """

    name: ClassVar[str] = "split-geglu"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Split all sites."""
        matched = 0
        skipped: list[Skipped] = []
        for gate in [node for node in model.graph if domain.is_fused(node, domain.BIAS_GEGLU)]:
            found = _match(gate)
            if isinstance(found, str):
                skipped.append(Skipped(site(gate), found))
                continue
            _split(model.graph, gate, *found)
            matched += 1
        return PassReport(name=self.name, matched=matched, skipped=tuple(skipped))


def _match(gate: ir.Node) -> tuple[ir.Node, LinearWeight] | str:
    product = producer(gate.inputs[0], "MatMul")
    if product is None or sole_consumer(product.outputs[0]) is not gate:
        return "the argument is no MatMul that only the gate reads"
    weight = match_linear_weight(product.inputs[1])
    if weight is None:
        return "the weight is no matrix of its own, with scales per output channel if it is quantised"
    if constant(gate.inputs[1]) is None:
        return "the bias is computed, expected an initialiser"
    return product, weight


def _split(graph: ir.Graph, gate: ir.Node, product: ir.Node, weight: LinearWeight) -> None:
    x, bias, y = product.inputs[0], gate.inputs[1], gate.outputs[0]
    assert bias is not None
    half = weight.width // 2
    rank_and_rows = dimensions(y)
    new: list[ir.Node] = []

    def apply(op_type: str, inputs: list[ir.Value | None], name: str, **attributes: str) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{gate.name}.{name}")
        node.outputs[0].name, node.outputs[0].type = f"{y.name}.{name}", y.type
        node.outputs[0].shape = y.shape if rank_and_rows is not None else None
        new.append(node)
        return node.outputs[0]

    def branch(begin: int, name: str) -> ir.Value:
        columns, dequantise = columns_of_weight(graph, weight, begin, begin + half, name)
        new.extend(dequantise)
        part = add_columns(graph, bias, begin, begin + half, f"{bias.name}.{gate.name}.{name}")
        return apply("Add", [apply("MatMul", [x, columns], f"{name}_product"), part], name)

    value, argument = branch(0, "value"), branch(half, "gate")
    approximate = gate.attributes.get_string("approximate", "none")
    active = apply("Gelu", [argument], "active", approximate=approximate)
    result = apply("Mul", [value, active], "result")
    old = [product, gate, *([weight.dequantise] if weight.dequantise is not None else [])]
    ir.convenience.replace_nodes_and_values(graph, gate, old, new, [y], [result])
