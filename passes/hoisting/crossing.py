"""Tensors that cross from one of several graphs to another: float32, with names of their own; see `hoist`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import onnx_ir as ir

from sdc.passes.hoisting.hoist_cut import TIMESTEP, Cut
from sdc.passes.matching import dimensions, same_size

_CHANNELS = 1
"""The axis along which values are joined."""


@dataclass(frozen=True)
class Packet:
    """What crosses as one tensor.

    Attributes:
        name: of the tensor.
        values: of the graph that is cut: one, or several of one type that differ in their channels only.
        shape: of the tensor: that of the only value, or of all joined along the channels; with one row where the values
            are computed for one row.
    """

    name: str
    values: tuple[ir.Value, ...]
    shape: ir.Shape

    @property
    def dtype(self) -> ir.DataType:
        """What the values are inside of the graphs."""
        dtype = self.values[0].dtype
        assert dtype is not None
        return dtype

    def join(self, graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
        """The tensor, at the end of a graph that computes the values."""
        if len(values) == 1:
            return values[0]
        node = ir.node("Concat", values, {"axis": _CHANNELS})
        graph.append(node)
        return describe(node.outputs[0], f"{self.name}.joined", self.shape, self.dtype)

    def split(self, graph: ir.Graph, whole: ir.Value, *, before: ir.Node) -> list[ir.Value]:
        """The values, in a graph that is given the tensor."""
        if len(self.values) == 1:
            return [whole]
        shapes = [(self.shape[0], *(value.shape or ())[1:]) for value in self.values]
        sizes = ir.Value(
            name=f"{self.name}.sizes", shape=ir.Shape([len(shapes)]), type=ir.TensorType(ir.DataType.INT64)
        )
        sizes.const_value = ir.tensor(np.array([shape[_CHANNELS] for shape in shapes], np.int64), name=sizes.name)
        graph.register_initializer(sizes)
        node = ir.node("Split", [whole, sizes], {"axis": _CHANNELS}, num_outputs=len(shapes))
        graph.insert_before(before, node)
        return [
            describe(value, f"{self.name}.{index}", ir.Shape(shape), self.dtype)
            for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True))
        ]


def packets_of(graph: ir.Graph, cut: Cut) -> dict[str, list[Packet]]:
    """What crosses, by part.

    Values of the prompt cross by themselves, as they are handed over once. Those of a timestep are handed over at every
    step, where each tensor costs time of its own: such as can be joined are one tensor.
    """
    return {
        part: [
            Packet(name, values, _joined_shape(values, cut))
            for name, values in zip(free_names(graph, part), _groups(part, cut), strict=False)
        ]
        for part in cut.crossing
    }


def _groups(part: str, cut: Cut) -> list[tuple[ir.Value, ...]]:
    """The values that cross from a part, those together that are joined, in the order of the first of each."""
    groups: dict[object, list[ir.Value]] = {}
    for value in cut.crossing[part]:
        shape = _shape_outside(value, cut)
        joinable = part == TIMESTEP and len(shape) > _CHANNELS and isinstance(shape[_CHANNELS], int)
        key = (value.dtype, shape[:_CHANNELS], shape[_CHANNELS + 1 :]) if joinable else value
        groups.setdefault(key, []).append(value)
    return [tuple(values) for values in groups.values()]


def _shape_outside(value: ir.Value, cut: Cut) -> tuple[int | ir.SymbolicDim, ...]:
    """Of a value that crosses: with one row if it is computed for one row."""
    assert value.shape is not None
    return (1, *value.shape[1:]) if value in cut.batches else value.shape.dims


def _joined_shape(values: tuple[ir.Value, ...], cut: Cut) -> ir.Shape:
    shapes = [_shape_outside(value, cut) for value in values]
    if len(shapes) == 1:
        return ir.Shape(shapes[0])
    channels = sum(size for shape in shapes if isinstance(size := shape[_CHANNELS], int))
    return ir.Shape([*shapes[0][:_CHANNELS], channels, *shapes[0][_CHANNELS + 1 :]])


def free_names(graph: ir.Graph, part: str) -> Iterator[str]:
    """``prompt.0`` and so on; a number whose name something in the graph has already is left out."""
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    taken |= set(graph.initializers)
    return (name for name in (f"{part}.{index}" for index in count()) if name not in taken)


def give_out(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """`value` as an output called `name`, in float32."""
    if value.dtype == ir.DataType.FLOAT and not value.is_graph_input():
        value.name = name
        return value
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    graph.append(node)
    return describe(node.outputs[0], name, value.shape, ir.DataType.FLOAT)


def describe(value: ir.Value, name: str | None, shape: ir.Shape | None, dtype: ir.DataType | None) -> ir.Value:
    """`value` with a name, a shape and a type."""
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value


def take_in(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, *, before: ir.Node) -> ir.Value:
    """A float32 input of the graph in the type that its readers want."""
    if dtype == ir.DataType.FLOAT:
        return value
    node = ir.node("Cast", [value], {"to": dtype.value})
    graph.insert_before(before, node)
    return describe(node.outputs[0], f"{value.name}.{dtype.name.lower()}", value.shape, dtype)


def read_sizes_of(node: ir.Node, values: Iterable[ir.Value]) -> None:
    """Let a Shape read the same sizes of the first of some values that has them; it stays as it is if none has."""
    wanted = _sizes_read(node, node.inputs[0])
    for value in values:
        found = _sizes_read(node, value)
        if wanted and len(found) == len(wanted) and all(map(same_size, found, wanted)):
            node.replace_input_with(0, value)
            break


def _sizes_read(node: ir.Node, value: ir.Value | None) -> tuple[int | str | None, ...]:
    """What a Shape would give of another value."""
    end = node.attributes.get_int("end") if "end" in node.attributes else None
    return (dimensions(value) or ())[node.attributes.get_int("start", 0) : end]
