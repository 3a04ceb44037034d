"""A QuantizeLinear and the DequantizeLinear behind it."""

from __future__ import annotations

import onnx_ir as ir

from sdc.engines.errors import PassError


def insert_pair(
    graph: ir.Graph,
    value: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value,
    dtype: ir.DataType,
    *,
    kind: str,
    axis: int | None = None,
) -> ir.Value:
    """`value` behind a pair, directly after what computes it.

    Args:
        graph: receives the two nodes; the readers of `value` stay as they are.
        value: what is quantised.
        scale: a constant of the graph; the pair is named after it.
        zero_point: likewise; its type is that of the integers or eight-bit floats.
        dtype: of the result.
        kind: "int8" or "fp8", for the name of what is between the two.
        axis: of the scales; None if there is a single one.
    """
    assert zero_point.dtype is not None  # a constant's is known
    attributes = {} if axis is None else {"axis": axis}
    quantise = ir.node("QuantizeLinear", [value, scale, zero_point], attributes)
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero_point], attributes)
    quantise.outputs[0].name, dequantise.outputs[0].name = f"{scale.name}.{kind}", f"{scale.name}.dequantised"
    quantise.outputs[0].dtype, dequantise.outputs[0].dtype = zero_point.dtype, dtype
    quantise.outputs[0].shape = dequantise.outputs[0].shape = value.shape
    _insert_behind(graph, value, quantise, dequantise)
    return dequantise.outputs[0]


def insert_dynamic_pair(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """`value` behind a pair whose uint8 range is that of its values, in each run anew.

    Args:
        graph: receives the two nodes; the readers of `value` stay as they are.
        value: what is quantised.
        dtype: of the result.

    Raises:
        PassError: it is not float32, the only type that the operator takes.
    """
    if dtype != ir.DataType.FLOAT:
        raise PassError(f"a dynamic range of {value.name!r}, which is {dtype.name}", hint="leave the rest in float32")
    quantise = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
    dequantise = ir.node("DequantizeLinear", quantise.outputs)
    for output, name, kind in zip(
        (*quantise.outputs, *dequantise.outputs),
        ("uint8", "scale", "zero_point", "dequantised"),
        (ir.DataType.UINT8, dtype, ir.DataType.UINT8, dtype),
        strict=True,
    ):
        output.name, output.dtype = f"{value.name}.dynamic.{name}", kind
        output.shape = ir.Shape([]) if name in ("scale", "zero_point") else value.shape
    _insert_behind(graph, value, quantise, dequantise)
    return dequantise.outputs[0]


def _insert_behind(graph: ir.Graph, value: ir.Value, *nodes: ir.Node) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph[0], nodes)
