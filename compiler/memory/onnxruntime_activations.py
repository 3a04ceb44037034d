"""The activations of an engine as ONNX Runtime's CPU provider has them in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from sdc.passes.matching import producer
from sdc.passes.memory.buffers import SizedGraph, Step

_FLOAT32_BYTES = 4
_EXPANDING = frozenset({"Conv", "Gemm"})
"""Products with no kernel for weights alone in integers; MatMul has one (MatMulNBits)."""


def expanded_weights(graph: ir.Graph) -> dict[str, int]:
    """Weights of integers that are expanded to float32 in every run: their bytes then, by what their product writes.

    It is so where a product's other operand is no integer either.
    """
    expanded = {}
    for node in graph:
        if node.op_type not in _EXPANDING or producer(node.inputs[0], "DequantizeLinear") is not None:
            continue
        dequantise = producer(node.inputs[1], "DequantizeLinear")
        weight = None if dequantise is None or dequantise.inputs[0] is None else dequantise.inputs[0].const_value
        if weight is not None:
            expanded[node.outputs[0].name or ""] = _FLOAT32_BYTES * weight.size
    return expanded


def as_onnxruntime_holds(graph: SizedGraph, expanded: Mapping[str, int]) -> SizedGraph:
    """The graph with steps that expand weights, each right before the product that reads it.

    Args:
        graph: in the order in which it runs.
        expanded: from `expanded_weights`.
    """
    names, sizes, steps = list(graph.names), list(graph.bytes), []
    for step in graph.steps:
        written = graph.names[step.writes[0]] if len(step.writes) == 1 else ""
        if written in expanded and step.operator in _EXPANDING:
            weight = len(names)
            names.append(f"{written}.weight")
            sizes.append(expanded[written])
            steps.append(Step("DequantizeLinear", (), (weight,)))
            steps.append(replace(step, reads=(*step.reads, weight)))
        else:
            steps.append(step)
    return replace(graph, names=tuple(names), bytes=tuple(sizes), steps=tuple(steps))
