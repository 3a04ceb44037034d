"""Columns of a linear layer's weight, cut when they are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdc.passes.mapped_tensors import release
from sdc.passes.matching import producer


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a MatMul, plain or dequantised.

    Attributes:
        stored: the initialiser [in, out].
        dequantise: the DequantizeLinear between it and the MatMul, or None.
    """

    stored: ir.Value
    dequantise: ir.Node | None

    @property
    def width(self) -> int:
        """Number of output channels."""
        assert self.stored.shape is not None
        return int(self.stored.shape.numpy()[1])


def match_linear_weight(value: ir.Value | None) -> LinearWeight | None:
    """The weight behind `value`: an initialiser of rank 2 that has one reader; None if it is anything else."""
    dequantise = producer(value, "DequantizeLinear")
    if dequantise is not None and value is not None and len(value.uses()) != 1:
        return None
    stored = value if dequantise is None else dequantise.inputs[0]
    if stored is None or not stored.is_initializer() or stored.is_graph_output() or len(stored.uses()) != 1:
        return None
    if stored.shape is None or len(stored.shape) != 2 or not stored.shape.is_static():
        return None
    if dequantise is not None and not _is_per_output_channel(dequantise):
        return None
    return LinearWeight(stored, dequantise)


def _is_per_output_channel(dequantise: ir.Node) -> bool:
    """Whether scales and zero points are per column or single."""
    blocked = dequantise.attributes.get_int("block_size", 0) != 0
    axis = dequantise.attributes.get_int("axis", 1)
    parameters = [value for value in dequantise.inputs[1:] if value is not None]
    return not blocked and all(
        each.is_initializer() and each.shape is not None and (len(each.shape) == 0 or axis in (1, -1))
        for each in parameters
    )


def add_columns(graph: ir.Graph, value: ir.Value, begin: int, end: int, name: str) -> ir.Value:
    """An initialiser with the columns `begin` to `end` of `value`, along its last axis.

    A matrix is cut whenever it is read, from the tensor that it came from; a vector at once.
    """
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape([*tensor.shape.numpy()[:-1], end - begin])

    def cut() -> ir.TensorProtocol:
        columns = ir.tensor(np.ascontiguousarray(tensor.numpy()[..., begin:end]), dtype=tensor.dtype, name=name)
        release(tensor)
        return columns

    cut_tensor = cut() if len(shape) < 2 else ir.LazyTensor(cut, dtype=tensor.dtype, shape=shape, name=name)
    columns = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=cut_tensor)
    graph.register_initializer(columns)
    return columns


def columns_of_weight(
    graph: ir.Graph, weight: LinearWeight, begin: int, end: int, suffix: str
) -> tuple[ir.Value, list[ir.Node]]:
    """The operand for a MatMul with some of the output channels, and the nodes that make it (not yet in the graph)."""
    stored = add_columns(graph, weight.stored, begin, end, f"{weight.stored.name}.{suffix}")
    if weight.dequantise is None:
        return stored, []
    parameters: list[ir.Value | None] = []
    for parameter in weight.dequantise.inputs[1:]:
        if parameter is None or parameter.shape is None or len(parameter.shape) == 0:
            parameters.append(parameter)
        else:
            parameters.append(add_columns(graph, parameter, begin, end, f"{parameter.name}.{suffix}"))
    node = ir.node("DequantizeLinear", [stored, *parameters], weight.dequantise.attributes)
    output, old = node.outputs[0], weight.dequantise.outputs[0]
    output.name, output.shape, output.type = f"{stored.name}.dequantised", stored.shape, old.type
    return output, [node]
