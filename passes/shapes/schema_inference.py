"""Asks ONNX's own inference about a single operator."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from sdc.passes.shapes.shape_rules import known_shape
from sdc.passes.shapes.size_contents import Contents


def inferred_types(node: ir.Node, contents: Mapping[ir.Value, Contents], version: int) -> list[onnx.TypeProto | None]:
    """Types and shapes of all outputs by ONNX's inference of the one operator; None where it says nothing."""
    nothing: list[onnx.TypeProto | None] = [None] * len(node.outputs)
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return nothing
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    proto.attribute.extend(ir.serde.serialize_attribute(each) for each in node.attributes.values())
    proto.output.extend(f"y{index}" for index in range(len(node.outputs)))
    types, data = {}, {}
    for index, value in enumerate(node.inputs):
        proto.input.append("" if value is None else f"x{index}")
        if value is None or value.dtype is None:
            continue
        types[f"x{index}"] = _type_proto(value)
        held = contents.get(value)
        if held is not None and all(isinstance(each, int) for each in held.flat):
            data[f"x{index}"] = ir.serde.serialize_tensor(ir.tensor(held.astype(value.dtype.numpy())))
    if len(types) < sum(value is not None for value in node.inputs):
        return nothing
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid(node.domain, version)]
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return nothing
    return [found.get(name) for name in proto.output]


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    shape = known_shape(value)
    sizes = (
        None
        if shape is None
        else [size if isinstance(size, int) else None if size is None else size.value for size in shape]
    )
    assert value.dtype is not None
    return onnx.helper.make_tensor_type_proto(int(value.dtype), sizes)
