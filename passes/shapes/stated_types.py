"""Types and shapes of a node's outputs: what the graph states, what follows, or a new symbol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

import onnx_ir as ir

from sdc.passes.shapes.contributed_shapes import contributed_shape
from sdc.passes.shapes.schema_inference import inferred_types
from sdc.passes.shapes.shape_rules import Shape, known_shape, result_shape, whole_shape
from sdc.passes.shapes.size_contents import Contents, computed_contents, initial_contents
from sdc.passes.shapes.sizes import Size, normal_size, symbols


def input_symbols(graph: ir.Graph) -> frozenset[str]:
    """Names of the free sizes of the graph's inputs."""
    return frozenset(
        name for value in graph.inputs for size in known_shape(value) or () if size for name in symbols(size)
    )


def fresh_symbols(graph: ir.Graph) -> Iterator[ir.SymbolicDim]:
    """New names for sizes that nothing determines."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    taken = {
        name for value in values for size in known_shape(value) or () if size is not None for name in symbols(size)
    }
    return (ir.SymbolicDim(name) for name in (f"size_{n}" for n in count()) if name not in taken)


def state_graph_types(graph: ir.Graph) -> None:
    """State types and shapes of all values, as `state_types` does, and change nothing else."""
    version, inputs, fresh = graph.opset_imports.get("", 1), input_symbols(graph), fresh_symbols(graph)
    contents = {value: initial_contents(value) for value in graph.initializers.values()}
    known: dict[ir.Value, Contents] = {value: held for value, held in contents.items() if held is not None}
    for node in graph:
        state_types(node, known, version, inputs, fresh)
        shape = whole_shape(node.outputs[0])
        if node.domain == "" and shape is not None:
            held = computed_contents(node, known, shape)
            if held is not None:
                known[node.outputs[0]] = held


def state_types(
    node: ir.Node,
    contents: Mapping[ir.Value, Contents],
    version: int,
    inputs: frozenset[str],
    fresh: Iterator[ir.SymbolicDim],
) -> None:
    """Write types and shapes of a node's outputs: what is stated, then what follows, then a new symbol.

    Args:
        node: its operands' types are known, as far as they can be.
        contents: of integer tensors, as far as they are known.
        version: of the standard operators.
        inputs: from `input_symbols`; statements in other symbols are replaced.
        fresh: from `fresh_symbols`.
    """
    if all(value.dtype is not None and _is_settled(known_shape(value), inputs) for value in node.outputs):
        for value in node.outputs:
            value.shape = ir.Shape(known_shape(value) or ())  # in the spelling that makes equal sizes equal
        return
    types = inferred_types(node, contents, version)
    for index, (value, proto) in enumerate(zip(node.outputs, types, strict=True)):
        found = _shape_by_rule(node, index, contents)
        if proto is not None and proto.HasField("tensor_type"):
            if value.dtype is None and proto.tensor_type.elem_type:
                value.dtype = ir.DataType(proto.tensor_type.elem_type)
            by_schema = ir.serde.deserialize_type_proto_for_shape(proto)
            if by_schema is not None:
                found = _merge(tuple(map(normal_size, by_schema)), found)
        stated = known_shape(value)
        merged = found if stated is None else _merge(stated, found, inputs)
        if merged is not None:
            value.shape = ir.Shape([next(fresh) if size is None else size for size in merged])


def _shape_by_rule(node: ir.Node, index: int, contents: Mapping[ir.Value, Contents]) -> Shape | None:
    if node.domain:
        return contributed_shape(node, index)
    return result_shape(node, contents) if index == 0 else None


def _is_settled(shape: Shape | None, inputs: frozenset[str]) -> bool:
    return shape is not None and all(size is not None and symbols(size) <= inputs for size in shape)


def _merge(stated: Shape, found: Shape | None, inputs: frozenset[str] | None = None) -> Shape:
    """Numbers first, then statements in symbols of the inputs, then what was found."""
    if found is None or len(found) != len(stated):
        return stated
    merged: list[Size | None] = []
    for ours, theirs in zip(found, stated, strict=True):
        trusted = theirs is not None and (isinstance(theirs, int) or inputs is None or symbols(theirs) <= inputs)
        merged.append(ours if isinstance(ours, int) or not trusted else theirs)
    return tuple(ours if ours is not None else theirs for ours, theirs in zip(merged, stated, strict=True))
