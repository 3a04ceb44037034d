"""float16 graphs in float32, with the same weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT


def widen_to_float32(model: ir.Model) -> bool:
    """Make every float16 of a graph float32, in place; whether there was one.

    Weights keep their values, and become float32 one by one when they are written. A precision can be chosen later as
    for any float32 graph; in float16 the weights are what they were.

    Before → after::

        weight, Constant, ConstantOfShape float16  →  float32
        Cast to float16                            →  Cast to float32
        types of all values float16                →  float32

    Not changed: CastLike and operators whose type follows from their inputs.
    """
    found = False
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph.all_nodes():
            values += node.outputs
            values += [value for inner in _subgraphs(node) for value in (*inner.inputs, *inner.initializers.values())]
            found |= _widen_attributes(node)
        for value in values:
            if value.dtype == HALF:
                value.dtype, found = FULL, True
            if value.const_value is not None and value.const_value.dtype == HALF:
                value.const_value, found = _widened(value.const_value), True
    return found


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [each.as_graph() for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]


def _widen_attributes(node: ir.Node) -> bool:
    found = False
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
            found = True
        elif name in ("to", "dtype", "softmax_precision") and attribute.as_int() == HALF:
            node.attributes[name] = ir.AttrInt64(name, FULL)
            found = True
    return found


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=FULL, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
