"""A QuantizeLinear and the DequantizeLinear behind it."""

from __future__ import annotations

import onnx_ir as ir


def insert_pair(
    graph: ir.Graph, value: ir.Value, scale: ir.Value, zero_point: ir.Value, dtype: ir.DataType, *, kind: str
) -> ir.Value:
    """`value` behind a pair, directly after what computes it.

    Args:
        graph: receives the two nodes; the readers of `value` stay as they are.
        value: what is quantised.
        scale: a constant of the graph; the pair is named after it.
        zero_point: likewise; its type is that of the integers or eight-bit floats.
        dtype: of the result.
        kind: "int8" or "fp8", for the name of what is between the two.
    """
    assert zero_point.dtype is not None  # a constant's is known
    quantise = ir.node("QuantizeLinear", [value, scale, zero_point])
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero_point])
    quantise.outputs[0].name, dequantise.outputs[0].name = f"{scale.name}.{kind}", f"{scale.name}.dequantised"
    quantise.outputs[0].dtype, dequantise.outputs[0].dtype = zero_point.dtype, dtype
    quantise.outputs[0].shape = dequantise.outputs[0].shape = value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, [quantise, dequantise])
    else:
        graph.insert_before(graph[0], [quantise, dequantise])
    return dequantise.outputs[0]
