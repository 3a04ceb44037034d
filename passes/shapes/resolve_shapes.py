"""State every shape that follows from the inputs' shapes, and compute shape arithmetic away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdc.passes.base import Pass, PassReport
from sdc.passes.shapes.schema_inference import inferred_types
from sdc.passes.shapes.shape_rules import Shape, known_shape, result_shape
from sdc.passes.shapes.size_contents import Contents, computed_contents, initial_contents
from sdc.passes.shapes.size_vectors import SizeVectors
from sdc.passes.shapes.sizes import Size, normal_size, symbols


@dataclass(frozen=True)
class ResolveShapes(Pass):
    """Every value has a type and a shape as far as they can be known, in symbols of the inputs' free sizes.

    Exporters differ in how they compute the target of a Reshape: by Shape, Gather, Div and Concat (TorchScript), or
    partly in advance (dynamo). Here sizes are followed through the graph as expressions, and whatever is known of a
    target is written into it.

    Before → after::

        i = any arithmetic on sizes, all results known    →  initialiser i
        Reshape(x: [B, S, 320], Concat(B, -1, 8, 40))     →  Reshape(x, [0, 0, 8, 40])
        Reshape(x: [B, S, C], Concat(B, H, W, C))         →  Reshape(x, Concat([0], Shape(z, start=2, end=4), [C]))
        Expand(x: [B, C], [B, C])                         →  x

    ``z`` is the first value of the graph that has the wanted sizes next to each other, so equal targets become equal
    nodes. Where an exporter stated a size in symbols of the inputs, or as a number, its statement stays: it may know
    relations between free sizes that inference does not. Symbols that belong to no input are replaced: the TorchScript
    exporter gives one name to different sizes. A size that nothing determines gets a symbol of its own.

    Preconditions of a new target:

    1. The shapes of operand and result are known.
    2. Each size is a number, or stands at the same place in the operand (0), or is the only one left (-1), or a value
       that is computed before has it.

    Not matched: targets with sizes that no value has; operators that hold subgraphs.
    """

    name: ClassVar[str] = "resolve-shapes"

    def rewrite(self, model: ir.Model) -> PassReport:
        """Resolve; the match count is the number of values that became constants and of targets that were rewritten."""
        graph = model.graph
        version = model.graph.opset_imports.get("", 1)
        fresh = _fresh_symbols(graph)
        inputs = frozenset(
            name for value in graph.inputs for size in known_shape(value) or () if size for name in symbols(size)
        )
        contents: dict[ir.Value, Contents] = {}
        for value in graph.initializers.values():
            _note(contents, value, initial_contents(value))
        sources = SizeVectors(graph, contents)
        folded = rewritten = 0
        for node in list(graph):
            _state_types(node, contents, version, inputs, fresh)
            shape = known_shape(node.outputs[0])
            if node.domain == "" and shape is not None and None not in shape:
                _note(contents, node.outputs[0], computed_contents(node, contents, shape))  # type: ignore[arg-type]
            constant = _fold(graph, node, contents.get(node.outputs[0]))
            if constant is not None:
                contents[constant] = contents[node.outputs[0]]
                folded += 1
            else:
                rewritten += sources.rewrite_target(node)
            sources.add(node)
        return PassReport(name=self.name, matched=folded + rewritten, details={"folded": folded, "targets": rewritten})


def _note(contents: dict[ir.Value, Contents], value: ir.Value, held: Contents | None) -> None:
    if held is not None:
        contents[value] = held


def _fresh_symbols(graph: ir.Graph) -> Iterator[ir.SymbolicDim]:
    """New names for sizes that nothing determines."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    taken = {
        name for value in values for size in known_shape(value) or () if size is not None for name in symbols(size)
    }
    return (ir.SymbolicDim(name) for name in (f"size_{n}" for n in count()) if name not in taken)


def _state_types(
    node: ir.Node,
    contents: dict[ir.Value, Contents],
    version: int,
    inputs: frozenset[str],
    fresh: Iterator[ir.SymbolicDim],
) -> None:
    """Write types and shapes of a node's outputs: what is stated, then what follows, then a new symbol."""
    if all(value.dtype is not None and _is_settled(known_shape(value), inputs) for value in node.outputs):
        for value in node.outputs:
            value.shape = ir.Shape(known_shape(value) or ())  # in the spelling that makes equal sizes equal
        return
    types = inferred_types(node, contents, version)
    for index, (value, proto) in enumerate(zip(node.outputs, types, strict=True)):
        found = result_shape(node, contents) if index == 0 and node.domain == "" else None
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


def _fold(graph: ir.Graph, node: ir.Node, held: Contents | None) -> ir.Value | None:
    """Replace a node by an initialiser if its result is known in full."""
    value = node.outputs[0]
    if held is None or value.is_graph_output() or not all(isinstance(each, int) for each in held.flat):
        return None
    assert value.dtype is not None
    constant = ir.Value(name=value.name, type=value.type, shape=ir.Shape(held.shape))
    constant.const_value = ir.tensor(np.asarray(held, dtype=value.dtype.numpy()), name=value.name)
    ir.convenience.replace_all_uses_with(value, constant)
    graph.remove(node, safe=True)
    graph.register_initializer(constant)
    return constant
